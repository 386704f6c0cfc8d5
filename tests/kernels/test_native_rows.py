"""The native kernels that go from row to row."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.cpu import NativeOps
from ferrum_rt.kernels.cpu.program import BatchSizes, Program, Rows
from ferrum_rt.kernels.sampling import argmax
from tests.kernels.targets import every_target, kernels_for, needed_kernels

# One rounding to the type; float32 is computed in itself.
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
dtypes = st.sampled_from(list(BOUNDS))
sizes = st.integers(1, 300)
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
EPS = 1e-6


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    opened = NativeOps(needed_kernels(), 2)
    yield opened
    opened.close()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.double(), expected, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


class Inside:
    """A matrix [rows, width] with something beside it, which must not change."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
        self._whole = random(rows, width + 5, dtype=dtype, seed=seed)
        self._before = self._whole.clone()
        self.matrix = self._whole[:, 2 : width + 2]

    def check_beside(self) -> None:
        self._before[:, 2:-3] = self.matrix
        assert torch.equal(self._whole, self._before)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def check_norms(ops: NativeOps, dtype: torch.dtype, rows: int, width: int, *, in_place: bool, seed: int) -> None:
    x, residual, out = (Inside(rows, width, dtype, seed + index) for index in range(3))
    weight = random(width, seed=seed)
    before, added = x.matrix.clone(), residual.matrix + x.matrix
    target = x if in_place else out
    ops.add_rms_norm(target.matrix, residual.matrix, x.matrix, weight, EPS)
    assert torch.equal(residual.matrix, added)
    close(target.matrix, normed(added, weight), dtype)
    x.matrix.copy_(before)
    ops.rms_norm(target.matrix, x.matrix, weight, EPS)
    close(target.matrix, normed(before, weight), dtype)
    for tensor in (x, residual, out):
        tensor.check_beside()


@settings(max_examples=60, deadline=None)
@given(dtype=dtypes, rows=st.integers(1, 40), width=sizes, in_place=st.booleans(), seed=st.integers(0, 1000))
def test_norms_are_those_of_float64(
    ops: NativeOps, dtype: torch.dtype, rows: int, width: int, in_place: bool, seed: int
) -> None:
    """Alone and after adding to the residual, which is rounded first; in place or not, nothing beside is written."""
    check_norms(ops, dtype, rows, width, in_place=in_place, seed=seed)


def check_rope(
    ops: NativeOps, dtype: torch.dtype, rows: int, heads: int, half: int, rest: int, *, has_norm: bool, seed: int
) -> None:
    dim, positions = 2 * half + rest, torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(seed))
    qkv = Inside(rows, (heads + 1) * dim, dtype, seed)
    weight = random(heads, dim + 1, seed=seed)[:, :dim] if has_norm else None
    angles = random(50, half, seed=seed + 1).double()
    table = torch.zeros(50, 2 * half + 3)[:, : 2 * half].copy_(torch.cat([angles.cos(), angles.sin()], dim=1))
    qk = qkv.matrix.unflatten(1, (heads + 1, dim))[:, :heads]
    expected = qkv.matrix.double().unflatten(1, (heads + 1, dim)).clone()
    wide = expected[:, :heads].clone() if weight is None else normed(qk, weight)
    cos, sin = angles.cos()[positions][:, None], angles.sin()[positions][:, None]
    first, second = wide[..., :half].clone(), wide[..., half : 2 * half].clone()
    wide[..., :half], wide[..., half : 2 * half] = first * cos - second * sin, second * cos + first * sin
    expected[:, :heads] = wide
    ops.qk_norm_rope(qk, weight, EPS, positions, table)
    close(qkv.matrix, expected.flatten(1), dtype)
    qkv.check_beside()


@settings(max_examples=60, deadline=None)
@given(
    dtype=dtypes, rows=st.integers(1, 40), heads=st.integers(1, 5), half=st.integers(1, 40), rest=st.integers(0, 20),
    has_norm=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_queries_and_keys_are_normed_and_rotated(
    ops: NativeOps, dtype: torch.dtype, rows: int, heads: int, half: int, rest: int, has_norm: bool, seed: int
) -> None:
    """Each head by its own weight, or none; dimensions past the rotary ones are not turned, the values not touched."""
    check_rope(ops, dtype, rows, heads, half, rest, has_norm=has_norm, seed=seed)


def check_activation(ops: NativeOps, dtype: torch.dtype, rows: int, width: int, kind: str, seed: int) -> None:
    gate_up, out = Inside(rows, 2 * width, dtype, seed), Inside(rows, width, dtype, seed + 1)
    gate_up.matrix.mul_(4)
    gate, up = gate_up.matrix.double().chunk(2, dim=1)
    ops.gated_activation(out.matrix, gate_up.matrix, kind)
    close(out.matrix, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up, dtype)
    out.check_beside()


@settings(max_examples=60, deadline=None)
@given(
    dtype=dtypes, rows=st.integers(1, 40), width=sizes, kind=st.sampled_from(["silu", "gelu_tanh"]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_activations_are_those_of_float64(
    ops: NativeOps, dtype: torch.dtype, rows: int, width: int, kind: str, seed: int
) -> None:
    """act(gate) * up, for any stride."""
    check_activation(ops, dtype, rows, width, kind, seed)


@every_dtype
def test_activations_of_extremes(ops: NativeOps, dtype: torch.dtype) -> None:
    """Where the gate is far below 0 the product is 0, far above it is gate * up, and NaN is NaN."""
    gate_up = torch.tensor([[-3e4, -200.0, -0.0, 200.0, 3e4, math.nan] + [1.0] * 6], dtype=dtype)
    for kind in ("silu", "gelu_tanh"):
        out = ops.empty((1, 6), dtype)
        ops.gated_activation(out, gate_up, kind)
        close(out[:, :5], gate_up[:, :5].double().clamp(min=0.0), dtype)
        assert bool(out[0, 5].isnan())


def check_look_ups(ops: NativeOps, dtype: torch.dtype, rows: int, width: int, scale: float, seed: int) -> None:
    table, out = Inside(23, width, dtype, seed), Inside(rows, width, dtype, seed + 1)
    ids = torch.randint(0, 23, (rows,), generator=torch.Generator().manual_seed(seed))
    ops.embed(out.matrix, ids, table.matrix, scale)
    assert torch.equal(out.matrix, table.matrix[ids] * torch.tensor(scale, dtype=dtype))
    ops.gather_rows(out.matrix, table.matrix, ids)
    assert torch.equal(out.matrix, table.matrix[ids])
    out.check_beside()


@settings(max_examples=40, deadline=None)
@given(
    dtype=dtypes, rows=st.integers(1, 40), width=sizes, scale=st.sampled_from([1.0, 2.0, 45.254833995939045, 0.1]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_are_looked_up_and_scaled(
    ops: NativeOps, dtype: torch.dtype, rows: int, width: int, scale: float, seed: int
) -> None:
    """To the bit: the scale is rounded to the type, then the product."""
    check_look_ups(ops, dtype, rows, width, scale, seed)


def check_soft_cap(ops: NativeOps, dtype: torch.dtype, rows: int, width: int, cap: float, seed: int) -> None:
    x = Inside(rows, width, dtype, seed)
    x.matrix.mul_(cap)
    expected = cap * torch.tanh(x.matrix.double() / cap)
    ops.soft_cap(x.matrix, cap)
    torch.testing.assert_close(x.matrix.double(), expected, atol=cap * BOUNDS[dtype] / 2, rtol=BOUNDS[dtype])
    x.check_beside()


@settings(max_examples=40, deadline=None)
@given(
    dtype=dtypes, rows=st.integers(1, 4), width=st.one_of(sizes, st.integers(8000, 17000)), cap=st.floats(0.5, 50.0),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_soft_cap_is_that_of_float64(
    ops: NativeOps, dtype: torch.dtype, rows: int, width: int, cap: float, seed: int
) -> None:
    """In place, for rows of several chunks too."""
    check_soft_cap(ops, dtype, rows, width, cap, seed)


def check_argmax(ops: NativeOps, logits: Tensor) -> None:
    values, ids = torch.full((len(logits),), 7.0), torch.full((len(logits),), 7)
    ops.argmax(values, ids, logits)
    expected_values, expected_ids = argmax(logits.float())
    assert ids.tolist() == expected_ids.tolist()
    assert torch.equal(values.nan_to_num(nan=1e9), expected_values.nan_to_num(nan=1e9))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dtype=dtypes, width=st.one_of(sizes, st.integers(1000, 3000)), seed=st.integers(0, 1000))
def test_argmax_is_the_first_largest(ops: NativeOps, data: st.DataObject, dtype: torch.dtype, width: int, seed: int) -> None:
    """With equal ones, with NaN, with nothing but -inf: as the sampler's argmax says."""
    logits = Inside(4, width, dtype, seed).matrix
    for row in logits[:3]:
        for at in data.draw(st.lists(st.integers(0, width - 1), max_size=4)):
            row[at] = data.draw(st.sampled_from([9.0, math.inf, -math.inf, math.nan, 0.0]))
    logits[3] = -math.inf
    check_argmax(ops, logits)
    check_argmax(ops, -logits[:3].abs())


@pytest.mark.parametrize("value", [math.nan, 9.0])
def test_argmax_finds_every_column(ops: NativeOps, value: float) -> None:
    """Wherever the largest stands, or NaN, that is its id."""
    width = 3 * 1024 + 37
    logits = torch.full((width, width), -1.0, dtype=torch.bfloat16).fill_diagonal_(value)
    values, ids = torch.empty(width), torch.empty(width, dtype=torch.int64)
    ops.argmax(values, ids, logits)
    assert torch.equal(ids, torch.arange(width))


Call = Callable[[NativeOps, Tensor, Tensor], None]


def calls(dtype: torch.dtype, full: int) -> dict[str, Call]:
    """Each op from x [N, 96] to out [N, 96], for N up to ``full``; what it reads besides stays where it is."""
    weight, head_weight = random(96, seed=1), random(4, 24, seed=2)
    angles, table = random(full, 10, seed=3), random(50, 96, dtype=dtype, seed=4)
    ids = torch.randint(0, 50, (full,), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(full).flip(0)

    def rope(ops: NativeOps, out: Tensor, x: Tensor) -> None:
        ops.rms_norm(out, x, weight, EPS)
        rows = slice(full - len(x), None)
        ops.qk_norm_rope(out.unflatten(1, (4, 24)), head_weight, EPS, positions[rows], angles)

    def soft_cap(ops: NativeOps, out: Tensor, x: Tensor) -> None:
        ops.add_rms_norm(out, x, x, weight, EPS)
        ops.soft_cap(out, 0.5)

    def activation(ops: NativeOps, out: Tensor, x: Tensor) -> None:
        ops.rms_norm(out, x, weight, EPS)
        ops.gated_activation(out[:, 7:55], x, "silu")

    return {
        "embed": lambda ops, out, x: ops.embed(out, ids[full - len(x) :], table, 3.0),
        "norm": lambda ops, out, x: ops.rms_norm(out, x, weight, EPS),
        "rope": rope,
        "soft_cap": soft_cap,
        "activation": activation,
    }


@pytest.mark.parametrize("name", ["embed", "norm", "rope", "soft_cap", "activation"])
@every_dtype
def test_a_row_does_not_depend_on_its_batch(ops: NativeOps, dtype: torch.dtype, name: str) -> None:
    """In a batch of 1 to 64, and on one thread or three, a row's result is the same to the bit."""
    call, x = calls(dtype, 64)[name], random(64, 96, dtype=dtype, seed=9)
    whole = torch.empty_like(x)
    call(ops, whole, x.clone())
    for rows in range(1, 64):
        out = torch.empty((rows, 96), dtype=dtype)
        call(ops, out, x[64 - rows :].clone())
        assert torch.equal(out, whole[64 - rows :]), rows
    for num_threads in (1, 3):
        other, out = NativeOps(needed_kernels(), num_threads), torch.empty_like(x)
        call(other, out, x.clone())
        other.close()
        assert torch.equal(out, whole)


@pytest.mark.parametrize("name", ["norm", "rope", "soft_cap", "activation"])
@every_dtype
def test_a_row_that_is_no_number_spoils_no_other(ops: NativeOps, dtype: torch.dtype, name: str) -> None:
    """NaN comes out of its own row, and the other rows are as they were."""
    call, x = calls(dtype, 5)[name], random(5, 96, dtype=dtype, seed=9)
    sound, spoilt = torch.empty_like(x), torch.empty_like(x)
    call(ops, sound, x.clone())
    x[2, 7] = math.nan
    call(ops, spoilt, x)
    assert bool(spoilt[2].isnan().any())
    others = [0, 1, 3, 4]
    assert torch.equal(spoilt[others], sound[others])


@pytest.mark.parametrize("name", ["embed", "norm", "rope", "soft_cap", "activation"])
@every_dtype
def test_what_is_recorded_runs_for_fewer_rows(ops: NativeOps, dtype: torch.dtype, name: str) -> None:
    """Recorded with all rows and run with some, it computes those as a call does, and the others not at all."""
    call, x = calls(dtype, 40)[name], random(40, 96, dtype=dtype, seed=9)
    expected, out = torch.empty_like(x), torch.full_like(x, 7.0)
    call(ops, expected, x.clone())
    given_x = x.clone()
    with ops.record(Rows.TOKENS, 40) as instructions:
        call(ops, out, given_x)
    program = Program(instructions)
    assert bool((out == 7).all())
    ops.run(program, BatchSizes(tokens=19, sampled=0, spans=0))
    assert torch.equal(out[:19], expected[:19])
    assert bool((out[19:] == 7).all())


def test_sampled_rows_are_recorded_apart(ops: NativeOps) -> None:
    """The rows that are sampled from are picked and their largest found, as many as a batch has."""
    hidden, rows = random(9, 33, seed=1), torch.tensor([8, 3, 0, 0])
    last, values, ids = torch.zeros(4, 33), torch.zeros(4), torch.full((4,), -1)

    with ops.record(Rows.SAMPLED, 4) as instructions:
        ops.gather_rows(last, hidden, rows)
        ops.argmax(values, ids, last)

    program = Program(instructions)
    ops.run(program, BatchSizes(tokens=9, sampled=2, spans=0))
    assert torch.equal(last[:2], hidden[rows[:2]])
    assert ids.tolist() == [*hidden[rows[:2]].argmax(dim=1).tolist(), -1, -1]


@pytest.mark.proof
@every_target
def test_every_instruction_set_computes_the_same(target: str) -> None:
    """Built for less than this machine has, down to the portable form, it is right as well."""
    opened = NativeOps(kernels_for(target), 2)
    try:
        for dtype in BOUNDS:
            for seed, (rows, width) in enumerate([(1, 64), (7, 33), (40, 300), (3, 5)]):
                check_norms(opened, dtype, rows, width, in_place=seed % 2 == 0, seed=seed)
                check_rope(opened, dtype, rows, 3, width // 5, seed, has_norm=seed % 2 == 0, seed=seed)
                check_look_ups(opened, dtype, rows, width, 45.25, seed)
                check_soft_cap(opened, dtype, rows, width, 30.0, seed)
                check_argmax(opened, random(rows, 11 * width, dtype=dtype, seed=seed))
                for kind in ("silu", "gelu_tanh"):
                    check_activation(opened, dtype, rows, width, kind, seed)
    finally:
        opened.close()
