"""Attention through the emulation of FlashInfer against a naive one in float64: eager steps of any shape, and decodes that
are planned anew for each replay of a graph."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.interfaces.errors import Unsupported
from ferrum_rt.interfaces.tensor import AttentionKind
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.cuda.attention import list_pages
from tests.fakes import flashinfer as emulation
from tests.fakes.recorder import Recorder
from tests.kernels.test_attention import naive

BLOCK_SIZE, NUM_PAGES, MAX_PAGES = 4, 64, 12
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}

dtypes = st.sampled_from([torch.bfloat16, torch.float16])
# Groups of 1, 2, 3, 4, 5, 7 and 8 heads: those that the decode for CUDA cores takes, and others.
heads = st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1), (8, 2), (5, 1), (7, 1), (8, 1)])
dims = st.sampled_from([64, 128, 256])
windows = st.sampled_from([None, 1, 5, 100])
soft_caps = st.sampled_from([None, 2.0])


@functools.cache  # zeroing the workspace takes longer than the tests
def cuda_ops(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CudaOps:
    return CudaOps("cpu", block_size=BLOCK_SIZE, kv_dtype=kv_dtype or dtype, dtype=dtype, flashinfer=emulation)


class Cache:
    """Slots with keys and values of ``lengths`` tokens in pages in random order, the rest of the pool full of NaN."""

    def __init__(
        self, ops: CudaOps, lengths: list[int], kind: AttentionKind, dtype: torch.dtype, kv_dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.ops, self.kind, self.dtype = ops, kind, dtype
        self.free = torch.randperm(NUM_PAGES, generator=self.generator).tolist()
        self.pages: KvPages = allocate_pages(NUM_PAGES * BLOCK_SIZE, kind.num_kv_heads, kind.head_dim, kv_dtype, "cpu")
        self.pages.data.view(torch.uint8).fill_(0x7F if kv_dtype.itemsize == 1 else 0xFF)
        assert self.pages.data[0].float().isnan().all()
        self.tables = torch.zeros((len(lengths), MAX_PAGES), dtype=torch.int32)
        shape = (0, kind.num_kv_heads, kind.head_dim)
        self.k, self.v = ([torch.zeros(shape, dtype=torch.float64) for _ in lengths] for _ in range(2))
        for slot, length in enumerate(lengths):
            self.grow(slot, length)

    def grow(self, slot: int, count: int) -> None:
        """``count`` more tokens, in further pages where the last has no room."""
        start = len(self.k[slot])
        for page in range(-(-start // BLOCK_SIZE), -(-(start + count) // BLOCK_SIZE)):
            self.tables[slot, page] = self.free.pop()
        kv = self.random(count, 2, self.kind.num_kv_heads, self.kind.head_dim)
        at = torch.arange(start, start + count)
        self.ops.append_kv(self.pages, kv, self.tables[slot, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE)
        kept = kv.to(self.pages.data.dtype).double()
        self.k[slot] = torch.cat([self.k[slot], kept[:, 0]])
        self.v[slot] = torch.cat([self.v[slot], kept[:, 1]])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def queries(self, count: int) -> Tensor:
        """Strided as in the decoder, where keys and values lie beside them."""
        return self.random(count, self.kind.num_heads + 2, self.kind.head_dim)[:, : self.kind.num_heads]

    def naive(self, q: Tensor, slot: int, start: int) -> Tensor:
        kind, end = self.kind, start + len(q)
        return naive(q.double(), self.k[slot][:end], self.v[slot][:end], start, kind.scale, kind.window, kind.soft_cap)


def attend(cache: Cache, q: Tensor, plan: object) -> Tensor:
    out = torch.full((len(q), q.shape[1] * q.shape[2]), math.nan, dtype=q.dtype)
    cache.ops.attention(out, q, cache.pages, plan, cache.kind)
    return out


def close(ours: Tensor, expected: Tensor) -> None:
    bound = BOUNDS[ours.dtype]
    torch.testing.assert_close(ours.double(), expected, atol=bound, rtol=bound)


def batch_of(spans: list[QuerySpan], tables: Tensor) -> TokenBatch:
    none = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(none, none, none, none, spans, tables, BLOCK_SIZE)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.one_of(st.just(1), st.integers(2, 12))), min_size=1, max_size=5),
    heads=heads,
    dim=dims,
    window=windows,
    soft_cap=soft_caps,
    dtype=dtypes,
    is_fp8=st.booleans(),
)
def test_mixed_steps_equal_the_naive_attention(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    soft_cap: float | None,
    dtype: torch.dtype,
    is_fp8: bool,
) -> None:
    """Decodes and chunks of prompts of any lengths, in any order of slots, in scattered pages among others full of NaN."""
    kv_dtype = torch.float8_e4m3fn if is_fp8 else dtype
    ops, kind = cuda_ops(dtype, kv_dtype), AttentionKind(*heads, dim, dim**-0.5, window, soft_cap)
    cache = Cache(ops, [start + count for start, count in lengths], kind, dtype, kv_dtype)
    spans, row = [], 0
    for slot, (start, count) in reversed(list(enumerate(lengths))):
        spans.append(QuerySpan(slot, row, count, start))
        row += count
    q = cache.queries(row)
    ours = attend(cache, q, ops.plan_attention(batch_of(spans, cache.tables), [kind]))
    expected = [cache.naive(q[span.row : span.row + span.num_tokens], span.slot, span.start) for span in spans]
    close(ours, torch.cat(expected))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    growth=st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=4),
    heads=heads,
    dim=dims,
    window=windows,
    soft_cap=soft_caps,
    dtype=dtypes,
    is_fp8=st.booleans(),
)
def test_decodes_are_right_at_each_replay(
    lengths: list[int],
    growth: list[list[int]],
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    soft_cap: float | None,
    dtype: torch.dtype,
    is_fp8: bool,
) -> None:
    """With one plan object that is never replaced: lengths grow between replays, into other pages, and slots trade rows."""
    kv_dtype = torch.float8_e4m3fn if is_fp8 else dtype
    ops, kind = cuda_ops(dtype, kv_dtype), AttentionKind(*heads, dim, dim**-0.5, window, soft_cap)
    cache = Cache(ops, lengths, kind, dtype, kv_dtype)
    decode = ops.decode_attention(len(lengths), MAX_PAGES, [kind])
    captured = decode.plan
    slots = list(range(len(lengths)))
    for step in growth:
        for slot, count in zip(slots, step, strict=False):
            cache.grow(slot, min(count, MAX_PAGES * BLOCK_SIZE - len(cache.k[slot])))
        slots = slots[1:] + slots[:1]
        num_tokens = [len(cache.k[slot]) for slot in slots]
        decode.replan(slots, num_tokens, cache.tables)
        q = cache.queries(len(slots))
        ours = attend(cache, q, captured)
        expected = [
            cache.naive(q[row : row + 1], slot, length - 1)
            for row, (slot, length) in enumerate(zip(slots, num_tokens, strict=True))
        ]
        close(ours, torch.cat(expected))
    assert decode.plan is captured


def test_a_replay_reads_the_same_memory() -> None:
    """The buffers that a captured graph points to are those that every later plan fills."""
    recorder = Recorder(emulation)
    ops = CudaOps("cpu", block_size=4, kv_dtype=torch.float16, dtype=torch.float16, flashinfer=recorder)
    kinds = [AttentionKind(2, 1, 64, 0.1), AttentionKind(2, 1, 64, 0.1, 3)]
    decode = ops.decode_attention(2, 3, kinds)
    made = [call.kwargs for call in recorder.calls]
    indptr, indices = made[0]["paged_kv_indptr_buffer"], made[0]["paged_kv_indices_buffer"]
    tables = torch.tensor([[5, 6, 7], [1, 2, 3]])
    for slots, num_tokens, pages in (([0, 1], [9, 2], [5, 6, 7, 1]), ([1, 0], [1, 5], [1, 5, 6])):
        decode.replan(slots, num_tokens, tables)
        assert indices[: len(pages)].tolist() == pages
        assert indptr[-1] == len(pages)
    assert len(indices) == 6


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=8),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_pages_are_listed_in_order(rows: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> None:
    """Those of each row's slot that its tokens take, and no more; the same slot may stand in several rows."""
    tables = torch.randperm(6 * 40).view(6, 40).to(dtype)
    pages = list_pages([slot for slot, _ in rows], [count for _, count in rows], tables, block_size)
    for row, (slot, count) in enumerate(rows):
        num_pages = math.ceil(count / block_size)
        listed = pages.indices[pages.indptr[row] : pages.indptr[row + 1]]
        assert listed.tolist() == tables[slot, :num_pages].tolist()
        assert int(pages.last_page_len[row]) == count - (num_pages - 1) * block_size
        assert int(pages.num_tokens[row]) == count
    assert int(pages.indptr[-1]) == len(pages.indices)
    assert {x.dtype for x in pages} == {torch.int32}


def test_kinds_are_planned_side_by_side() -> None:
    """Layers of two kinds in one step each attend their own way."""
    dtype, ops = torch.float16, cuda_ops(torch.float16)
    kinds = [AttentionKind(4, 2, 64, 0.125), AttentionKind(4, 2, 64, 0.25, 3, 2.0)]
    caches = [Cache(ops, [9, 5], kind, dtype, dtype) for kind in kinds]
    spans = [QuerySpan(0, 0, 1, 8), QuerySpan(1, 1, 2, 3)]
    plan = ops.plan_attention(batch_of(spans, caches[0].tables), kinds)
    for cache in caches:
        q = cache.queries(3)
        expected = torch.cat([cache.naive(q[:1], 0, 8), cache.naive(q[1:], 1, 3)])
        close(attend(cache, q, plan), expected)


@pytest.mark.parametrize("head_dim", [32, 80, 96, 512])
def test_other_head_dims_are_refused(head_dim: int) -> None:
    """Before anything is planned, with the field and what to use instead."""
    ops, kind = cuda_ops(torch.float16), AttentionKind(2, 1, head_dim, 1.0)
    batch = batch_of([QuerySpan(0, 0, 1, 0)], torch.zeros((1, 1), dtype=torch.int64))
    with pytest.raises(Unsupported, match=f"head_dim {head_dim}.*64, 128 or 256.*'cpu'"):
        ops.decode_attention(1, 1, [kind])
    with pytest.raises(Unsupported, match=f"head_dim {head_dim}"):
        ops.plan_attention(batch, [kind])


def test_more_decodes_than_there_is_room_for() -> None:
    """What a graph of so many rows would leave beside its results is counted before anything is captured."""
    ops, kind = cuda_ops(torch.bfloat16), AttentionKind(64, 8, 128, 0.1)
    ops.decode_attention(256, 1, [kind])
    with pytest.raises(Unsupported, match=r"max_running_requests 600.*64 heads of 128"):
        ops.decode_attention(600, 1, [kind])


def test_a_plan_is_for_its_number_of_rows() -> None:
    """Fewer or more rows are an error that says so, not a graph that reads what an earlier step left."""
    decode = cuda_ops(torch.float16).decode_attention(2, 3, [AttentionKind(2, 1, 64, 0.1)])
    for slots in ([0], [0, 1, 2]):
        with pytest.raises(ValueError, match="rows for a plan of 2"):
            decode.replan(slots, [1] * len(slots), torch.zeros((3, 3), dtype=torch.int64))
