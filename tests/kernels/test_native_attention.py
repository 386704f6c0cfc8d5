"""Native attention, and what it reads written to the pages."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.kernels.batch import QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.cpu import NativeOps
from ferrum_rt.kernels.cpu.program import BatchSizes, Program, Rows
from ferrum_rt.kernels.reference import ReferenceOps
from tests.kernels.targets import every_target, kernels_for, needed_kernels
from tests.kernels.test_attention import Case

# Results are about 1. In float32 sums differ in their order; bfloat16 rounds weights and results (and keys and values that
# lie in pages of a finer type), float16 the results.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 2e-3}
KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
ANY_LENGTHS = [(130, 1), (0, 9), (255, 1), (3, 1), (100, 60)]


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    opened = NativeOps(needed_kernels(), 2)
    yield opened
    opened.close()


def check_attention(case: Case, window: int | None, soft_cap: float | None) -> None:
    case.take_what_was_kept()
    ours, expected = case.run(case.q.shape[2] ** -0.5, window, soft_cap)
    bound = BOUNDS[case.q.dtype]
    torch.testing.assert_close(ours, expected, atol=bound, rtol=bound)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.one_of(st.integers(0, 10), st.integers(0, 400)), st.one_of(st.just(1), st.integers(2, 20))),
        min_size=1, max_size=4,
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (14, 2), (9, 1)]), dim=st.sampled_from([1, 4, 16, 33, 80, 130]),
    block_size=st.sampled_from([1, 4, 16, 24]), dtype=st.sampled_from(list(BOUNDS)), kv_dtype=st.sampled_from(KV_DTYPES),
    window=st.sampled_from([None, 1, 5, 128, 150, 1000]), soft_cap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_mixed_batches_equal_the_naive_attention(
    ops: NativeOps, lengths: list[tuple[int, int]], heads: tuple[int, int], dim: int, block_size: int, dtype: torch.dtype,
    kv_dtype: torch.dtype, window: int | None, soft_cap: float | None,
) -> None:  # fmt: skip
    """Over what the pages hold, for any lengths, shapes and types; pages that are nobody's hold NaN."""
    check_attention(Case(lengths, heads, dim, kv_dtype, ops=ops, dtype=dtype, block_size=block_size), window, soft_cap)


@pytest.mark.parametrize(("heads", "dim"), [((2, 1), 512), ((300, 2), 8)])
def test_large_heads_and_groups(ops: NativeOps, heads: tuple[int, int], dim: int) -> None:
    """Heads of 512 numbers, and more heads that share keys than a work item has rows."""
    check_attention(Case([(140, 3), (0, 5)], heads, dim, torch.float32, ops=ops), None, None)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_pages_hold_what_the_reference_writes(ops: NativeOps, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """To the bit, scales included: numbers of all sizes, zeros, and more than a type can hold. (Numbers that are denormal in
    bfloat16 may become 0 there: the processor's conversion does that.)"""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(37, 9, 19, generator=generator) * 2.0 ** torch.randint(-14, 10, (37, 9, 1), generator=generator)
    wide[4] = 0.0
    wide[5, :, 3] = 60000.0
    kv = wide.to(dtype)[:, 1:7].unflatten(1, (2, 3))
    slots = torch.randperm(64, generator=generator)[:37]
    expected, ours = (allocate_pages(64, 3, 19, kv_dtype, "cpu") for _ in range(2))
    for pages in (expected, ours):
        pages.data.view(torch.uint8).fill_(0x11)
        if pages.scales is not None:
            pages.scales.fill_(7.0)
    ReferenceOps().append_kv(expected, kv, slots)
    ops.append_kv(ours, kv, slots)
    assert torch.equal(ours.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert expected.scales is None or (ours.scales is not None and torch.equal(ours.scales, expected.scales))


@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.int8)], ids=str)
def test_a_row_does_not_depend_on_its_batch(ops: NativeOps, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Among 1 to 64 sequences, and on one thread or three, a sequence's result is the same to the bit."""
    lengths = [(29 * i % 300, 1 + 7 * (i % 5 == 0)) for i in range(64)]
    case = Case(lengths, (4, 2), 24, kv_dtype, ops=ops, dtype=dtype)
    kind = case.kind(0.2)
    whole = case.attend(case.q, case.spans, kind)
    for size in range(1, 64):
        first = case.spans[-size].row
        spans = [span._replace(row=span.row - first) for span in case.spans[-size:]]
        assert torch.equal(case.attend(case.q[first:], spans, kind), whole[first:]), size
    kernels = needed_kernels()
    for num_threads in (1, 3):
        other = NativeOps(kernels, num_threads)
        case.ops = other
        assert torch.equal(case.attend(case.q, case.spans, kind), whole)
        other.close()


@pytest.mark.parametrize("window", [None, 140])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_chunks(
    ops: NativeOps, dtype: torch.dtype, kv_dtype: torch.dtype, window: int | None
) -> None:
    """A prompt of 300 in one go, in chunks of 7, and token by token has the same results to the bit, whatever lies in the
    pages that it has not come to."""
    results = []
    for step in (300, 7, 1):
        case = Case([(0, 300)], (6, 2), 40, kv_dtype, ops=ops, dtype=dtype)
        kind, slots = case.kind(0.15, window), case.kv_slots(0, 300)
        kv = torch.stack([case.k[0], case.v[0]], dim=1).to(dtype)
        ops.append_kv(case.pages, torch.full_like(kv, math.nan), slots)
        parts = []
        for start in range(0, 300, step):
            end = min(300, start + step)
            ops.append_kv(case.pages, kv[start:end], slots[start:end])
            parts.append(case.attend(case.q[start:end], [QuerySpan(0, 0, end - start, start)], kind))
        results.append(torch.cat(parts))
    assert bool(results[0].isfinite().all())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_a_sequence_that_is_no_number_spoils_no_other(ops: NativeOps, kv_dtype: torch.dtype, spoilt: float) -> None:
    """NaN or infinity among one's keys and values, or its queries, comes out of its own rows as no number, and the others'
    are as they were."""
    case = Case(ANY_LENGTHS, (4, 2), 16, kv_dtype, ops=ops)
    kind = case.kind(0.25)
    sound = case.attend(case.q, case.spans, kind)
    ops.append_kv(case.pages, torch.full((1, 2, 2, 16), spoilt), case.kv_slots(0, 1))
    case.q[case.spans[3].row, :, 5] = spoilt
    result = case.attend(case.q, case.spans, kind)
    rows = [case.spans[0].row, case.spans[3].row]
    others = torch.ones(len(result), dtype=torch.bool)
    others[rows] = False
    assert not bool(result[rows].isfinite().any())
    assert torch.equal(result[others], sound[others])


def test_a_recorded_plan_reads_each_batch_anew(ops: NativeOps) -> None:
    """A plan recorded for the largest batch serves others, in any number of spans, and none, as the runner writes them."""
    case = Case(ANY_LENGTHS, (4, 2), 16, torch.float32, ops=ops)
    kind = case.kind(0.25)
    expected = case.attend(case.q, case.spans, kind)
    size = len(case.q)
    none = torch.zeros(0, dtype=torch.int64)
    batch = TokenBatch(none, torch.zeros(size), none, none, [QuerySpan(0, 0, 1, 0)] * 5, case.tables, case.block_size)
    q, out = torch.empty(size, 4, 16), torch.zeros(size, 64)

    with ops.record(Rows.TOKENS, size) as instructions:
        plan = ops.plan_attention(batch, [kind])
        ops.attention(out, q, case.pages, plan, kind)

    program = Program(instructions)
    assert not bool(out.any())
    for first in range(5):
        spans = case.spans[first:]
        row = spans[0].row
        q[: size - row] = case.q[row:]
        plan.spans[: len(spans)] = torch.tensor([span._replace(row=span.row - row) for span in spans])
        ops.run(program, BatchSizes(size - row, 0, len(spans)))
        assert torch.equal(out[: size - row], expected[row:])
    out.zero_()
    ops.run(program, BatchSizes(0, 0, 0))
    assert not bool(out.any())


@pytest.mark.proof
@every_target
def test_every_instruction_set_computes_the_same(target: str) -> None:
    """Built for less than this machine has, down to the portable form, it is right as well."""
    opened = NativeOps(kernels_for(target, may_emulate=False), 2)  # that would take minutes
    cases = [((4, 2), 16, None, None), ((9, 1), 33, 150, 2.0), ((4, 4), 80, 5, None)]
    try:
        for dtype in BOUNDS:
            for kv_dtype in KV_DTYPES:
                test_pages_hold_what_the_reference_writes(opened, dtype, kv_dtype)
                for heads, dim, window, soft_cap in cases:
                    check_attention(Case(ANY_LENGTHS, heads, dim, kv_dtype, ops=opened, dtype=dtype), window, soft_cap)
            test_a_row_does_not_depend_on_the_chunks(opened, dtype, torch.bfloat16, None)
    finally:
        opened.close()
