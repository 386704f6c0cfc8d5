"""Paged attention against a naive float64 one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind, TensorOps
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.reference import ReferenceOps

BLOCK_SIZE = 4


def naive(
    q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """One sequence, one query and one head at a time: q [n, heads, dim] at ``start`` over keys [length, kv heads, dim]."""
    count, num_heads, dim = q.shape
    shared = num_heads // keys.shape[1]
    out = torch.zeros(count, num_heads * dim, dtype=torch.float64)
    for row in range(count):
        last = start + row
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(num_heads):
            scores = keys[first : last + 1, head // shared] @ q[row, head] * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = torch.softmax(scores, dim=-1)
            out[row, head * dim : (head + 1) * dim] = weights @ values[first : last + 1, head // shared]
    return out


class Case:
    """Sequences of (computed, new) tokens in pages in random order, the rest of the pool full of NaN. Queries and results
    are parts of wider rows."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: tuple[int, int],
        dim: int,
        kv_dtype: torch.dtype,
        *,
        ops: TensorOps[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths) * 31 + dim)
        self.ops: TensorOps[Tensor] = ReferenceOps() if ops is None else ops
        self.block_size = block_size
        num_heads, num_kv_heads = heads
        num_pages = [-(-sum(length) // block_size) for length in lengths]
        order = torch.randperm(sum(num_pages) + 8, generator=generator).split([*num_pages, 8])
        self.pages = allocate_pages((sum(num_pages) + 8) * block_size, num_kv_heads, dim, kv_dtype, "cpu")
        if self.pages.scales is not None:
            self.pages.scales.fill_(math.nan)
        else:
            self.pages.data.copy_(torch.tensor(math.nan))
        self.tables = torch.zeros((len(lengths), max(num_pages)), dtype=torch.int64)
        self.k, self.v, self.spans = [], [], []
        row = 0
        for slot, (start, count) in enumerate(lengths):
            self.tables[slot, : num_pages[slot]] = order[slot]
            kv = torch.randn(start + count, 2, num_kv_heads, dim, generator=generator).to(dtype)
            self.ops.append_kv(self.pages, kv, self.kv_slots(slot, start + count))
            self.k.append(kv[:, 0].double())
            self.v.append(kv[:, 1].double())
            self.spans.append(QuerySpan(slot, row, count, start))
            row += count
        self.q = torch.randn(row, num_heads + 3, dim, generator=generator).to(dtype)[:, :num_heads]

    def kv_slots(self, slot: int, length: int) -> Tensor:
        at = torch.arange(length)
        return self.tables[slot, at // self.block_size] * self.block_size + at % self.block_size

    def take_what_was_kept(self) -> None:
        """From now on the naive attention is over what the pages hold, not over what was appended to them."""
        for slot, keys in enumerate(self.k):
            rows = self.kv_slots(slot, len(keys))
            kept = self.pages.data.to(torch.float64)[rows]
            if self.pages.scales is not None:
                kept *= self.pages.scales[rows].double()[..., None]
            self.k[slot], self.v[slot] = kept.unbind(1)

    def kind(self, scale: float, window: int | None = None, soft_cap: float | None = None) -> AttentionKind:
        return AttentionKind(self.q.shape[1], self.k[0].shape[1], self.q.shape[2], scale, window, soft_cap)

    def attend(self, q: Tensor, spans: list[QuerySpan], kind: AttentionKind) -> Tensor:
        """Of queries [n, heads, dim] whose rows ``spans`` name."""
        none = torch.zeros(0, dtype=torch.int64)
        batch = TokenBatch(none, torch.zeros(len(q)), none, none, spans, self.tables, self.block_size)
        width = kind.num_heads * kind.head_dim
        out = torch.full((len(q), width + 3), 7.0, dtype=q.dtype)
        self.ops.attention(out[:, :width], q, self.pages, self.ops.plan_attention(batch, [kind]), kind)
        assert bool((out[:, width:] == 7).all()), "something was written beside the output"
        return out[:, :width]

    def run(self, scale: float, window: int | None, soft_cap: float | None) -> tuple[Tensor, Tensor]:
        """(ours, naive), both [N, heads * dim]."""
        expected = [
            naive(
                self.q[span.row : span.row + span.num_tokens].double(),
                self.k[span.slot],
                self.v[span.slot],
                span.start,
                scale,
                window,
                soft_cap,
            )
            for span in self.spans
        ]
        return self.attend(self.q, self.spans, self.kind(scale, window, soft_cap)).double(), torch.cat(expected)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.one_of(st.just(1), st.integers(2, 12))), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    dim=st.sampled_from([4, 16]),
    window=st.sampled_from([None, 1, 5, 100]),
    soft_cap=st.sampled_from([None, 2.0]),
)
def test_mixed_batches_equal_the_naive_attention(
    lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int, window: int | None, soft_cap: float | None
) -> None:
    """Decodes and prefill chunks of any lengths, with windows, soft caps and grouped heads, in pages scattered among others
    that hold NaN: float32 results are within 1e-5."""
    ours, expected = Case(lengths, heads, dim, torch.float32).run(dim**-0.5, window, soft_cap)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_long_prefills_are_cut_into_blocks() -> None:
    """A chunk longer than a block of queries gets the same results."""
    case = Case([(0, 45)], (2, 1), 8, torch.float32)
    from ferrum_rt.kernels import attention

    whole, expected = case.run(0.5, None, None)
    block, attention.QUERY_BLOCK = attention.QUERY_BLOCK, 7
    try:
        cut, _ = case.run(0.5, None, None)
    finally:
        attention.QUERY_BLOCK = block
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cut, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float8_e4m3fn, 2e-1), (torch.int8, 2e-2)],
)
def test_kv_dtypes_round_within_their_precision(dtype: torch.dtype, error: float) -> None:
    """Keys and values kept in a smaller type change the result by no more than that type's rounding."""
    ours, expected = Case([(20, 1), (7, 1), (0, 9)], (4, 2), 16, dtype).run(0.25, None, None)
    assert (ours - expected).abs().max() < error


def test_int8_pages_take_a_quarter_of_float32() -> None:
    """int8 pages with their scales are about a quarter the size of float32 pages."""

    def size(pages: KvPages) -> int:
        return pages.data.nbytes + (pages.scales.nbytes if pages.scales is not None else 0)

    assert size(allocate_pages(64, 2, 64, torch.int8, "cpu")) <= 0.27 * size(allocate_pages(64, 2, 64, torch.float32, "cpu"))
