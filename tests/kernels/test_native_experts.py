"""The native mixture of experts."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.cpu import NativeOps
from ferrum_rt.kernels.cpu.program import KINDS, BatchSizes, Kind, Program, Rows
from tests.kernels.targets import every_target, kernels_for, needed_kernels

# Of the largest output: some roundings to the type, of numbers that may cancel each other.
BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
BOUND_OF_BYTES = 4e-2
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
either_kind = pytest.mark.parametrize("is_int8", [False, True])


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    opened = NativeOps(needed_kernels(), 2)
    yield opened
    opened.close()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Layer:
    """Experts, as weights and packed."""

    def __init__(
        self, ops: NativeOps, dtype: torch.dtype, num_experts: int, hidden: int, inner: int, *, is_int8: bool, has_bias: bool
    ) -> None:
        def linear(outer: int, inner: int, seed: int) -> tuple[Tensor, Tensor | None]:
            return random(outer, inner, seed=seed).div_(inner**0.5).to(dtype), (
                random(outer, dtype=dtype, seed=seed + 1) if has_bias else None
            )

        def pack(weight: Tensor, bias: Tensor | None) -> Any:
            return ops.pack(weight, bias, Kind.INT8 if is_int8 else KINDS[dtype])

        self.hidden, self.num_experts, self.dtype = hidden, num_experts, dtype
        self.experts = [
            (linear(2 * inner, hidden, 4 * index), linear(hidden, inner, 4 * index + 2)) for index in range(num_experts)
        ]
        self.packed = [(pack(*gate_up), pack(*down)) for gate_up, down in self.experts]

    def __call__(
        self, ops: NativeOps, x: Tensor, logits: Tensor, top_k: int, *, renormalize: bool = True, kind: str = "silu"
    ) -> Tensor:
        out = ops.empty((len(x), self.hidden), self.dtype)
        ops.mixture_of_experts(out, x, logits, self.packed, top_k=top_k, renormalize=renormalize, kind=kind)
        return out

    def row(self, x: Tensor, logits: Tensor, top_k: int, *, renormalize: bool, kind: str) -> Tensor:
        """One token's result in float64."""
        shares = torch.softmax(logits.double(), dim=-1)
        best = shares.sort(descending=True, stable=True).indices[:top_k]
        total = shares[best].sum() if renormalize else 1.0
        result = torch.zeros(self.hidden, dtype=torch.float64)
        for index in best.tolist():
            gate_up, down = self.experts[index]
            gate, up = linear64(x.double(), *gate_up).chunk(2)
            activated = (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up
            result += shares[index] / total * linear64(activated, *down)
        return result


def linear64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.double(), None if bias is None else bias.double())


def check(
    ops: NativeOps, dtype: torch.dtype, rows: int, num_experts: int, top_k: int, hidden: int, inner: int, *,
    renormalize: bool, has_bias: bool, kind: str, seed: int, is_int8: bool = False,
) -> None:  # fmt: skip
    layer = Layer(ops, dtype, num_experts, hidden, inner, is_int8=is_int8, has_bias=has_bias)
    x = random(rows, hidden + 3, dtype=dtype, seed=seed)[:, 1:-2]
    logits = random(rows, num_experts + 1, dtype=dtype, seed=seed + 1)[:, :-1]
    out = layer(ops, x, logits, top_k, renormalize=renormalize, kind=kind)
    expected = torch.stack(
        [layer.row(x[row], logits[row], top_k, renormalize=renormalize, kind=kind) for row in range(rows)]
    )
    error = (out.double() - expected).abs().max()
    assert error <= (BOUND_OF_BYTES if is_int8 else BOUNDS[dtype]) * max(1.0, float(expected.abs().max()))


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(), dtype=st.sampled_from(list(BOUNDS)), rows=st.integers(1, 20), num_experts=st.integers(1, 9),
    hidden=st.integers(1, 70), inner=st.integers(1, 70), renormalize=st.booleans(), has_bias=st.booleans(),
    kind=st.sampled_from(["silu", "gelu_tanh"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_mixture_is_that_of_float64(
    ops: NativeOps, data: st.DataObject, dtype: torch.dtype, rows: int, num_experts: int, hidden: int, inner: int,
    renormalize: bool, has_bias: bool, kind: str, seed: int,
) -> None:  # fmt: skip
    """For any shapes and strides, with experts that nobody chose, and with equal logits, of which the first is better."""
    top_k = data.draw(st.integers(1, num_experts))
    check(
        ops, dtype, rows, num_experts, top_k, hidden, inner, renormalize=renormalize, has_bias=has_bias, kind=kind, seed=seed
    )


@every_dtype
def test_experts_of_bytes(ops: NativeOps, dtype: torch.dtype) -> None:
    """Experts' weights may be int8; what comes out is near."""
    check(ops, dtype, 9, 5, 2, 64, 48, renormalize=True, has_bias=True, kind="silu", seed=1, is_int8=True)


def test_of_equal_logits_the_first_are_chosen(ops: NativeOps) -> None:
    """Equal ones are chosen in their order, and what is beyond the softmax's range by the logits."""
    layer = Layer(ops, torch.float32, 6, 8, 8, is_int8=False, has_bias=True)
    x = random(4, 8, seed=1)
    rows = [
        [1.0, 2.0, 2.0, 0.0, 2.0, 1.0],
        [0.0] * 6,
        [1.0, 2.0, 2.0, 0.0, 3.0, 1.0],
        [-300.0, -200.0, 0.0, -250.0, -400.0, -200.0],
    ]
    logits = torch.tensor(rows)
    out = layer(ops, x, logits, 2)
    # Rows whose best two are chosen for them.
    clear = torch.full((4, 6), -math.inf)
    for row, best in enumerate([(1, 2), (0, 1), (1, 4), (1, 2)]):
        clear[row, list(best)] = logits[row, list(best)]
    assert torch.equal(out, layer(ops, x, clear, 2))


@either_kind
@every_dtype
def test_a_token_does_not_depend_on_its_batch(ops: NativeOps, dtype: torch.dtype, is_int8: bool) -> None:
    """In a batch of 1 to 64, and on one thread or three, a token's result is the same to the bit."""
    layer = Layer(ops, dtype, 5, 72, 40, is_int8=is_int8, has_bias=False)
    x, logits = random(64, 72, dtype=dtype, seed=1), random(64, 5, dtype=dtype, seed=2)
    whole = layer(ops, x, logits, 2)
    for rows in range(1, 64):
        assert torch.equal(layer(ops, x[64 - rows :], logits[64 - rows :], 2), whole[64 - rows :]), rows
    for num_threads in (1, 3):
        other = NativeOps(needed_kernels(), num_threads)
        out = layer(other, x, logits, 2)
        other.close()
        assert torch.equal(out, whole)


@either_kind
def test_a_token_that_is_no_number_spoils_no_other(ops: NativeOps, is_int8: bool) -> None:
    """NaN in a token, or in its logits, comes out of that token, and the others are as they were."""
    layer = Layer(ops, torch.float32, 5, 72, 40, is_int8=is_int8, has_bias=True)
    x, logits = random(6, 72, seed=1), random(6, 5, seed=2)
    sound = layer(ops, x, logits, 3)
    x[1, 70], logits[2], logits[3, 4], logits[4, 0] = math.nan, math.nan, math.nan, math.nan
    spoilt = layer(ops, x, logits, 3)
    assert bool(spoilt[1:5].isnan().all())
    assert torch.equal(spoilt[[0, 5]], sound[[0, 5]])


@either_kind
@every_dtype
@pytest.mark.parametrize("top_k", [1, 3])
def test_what_is_recorded_runs_for_fewer_tokens(ops: NativeOps, dtype: torch.dtype, top_k: int, is_int8: bool) -> None:
    """Two layers, recorded with all tokens and run with some, compute those as calls do, and the others not at all; the
    widths are such that all scratch is alike."""
    layers = [Layer(ops, dtype, num_experts, 64, 64, is_int8=is_int8, has_bias=False) for num_experts in (5, 4)]
    x = random(40, 64, dtype=dtype, seed=1)
    routers = [random(40, layer.num_experts, dtype=dtype, seed=2) for layer in layers]
    expected = layers[1](ops, layers[0](ops, x, routers[0], top_k), routers[1], top_k)
    between, out = ops.empty((40, 64), dtype), torch.full((40, 64), 7.0, dtype=dtype)

    with ops.record(Rows.TOKENS, 40) as instructions:
        for layer, router, source, target in zip(layers, routers, (x, between), (between, out), strict=True):
            ops.mixture_of_experts(target, source, router, layer.packed, top_k=top_k, renormalize=True, kind="silu")

    program = Program(instructions)
    assert bool((out == 7).all())
    for tokens in (17, 1, 23):
        ops.run(program, BatchSizes(tokens=tokens, sampled=1, spans=2))
        assert torch.equal(out[:tokens], expected[:tokens])
    assert bool((out[23:] == 7).all())


def test_each_batch_size_has_its_name(ops: NativeOps) -> None:
    """Instructions on several rows for each token, sampled row or span work on that many."""
    x = random(12, 8, seed=1)
    for rows, batch in ((Rows.TOKENS, (2, 0, 0)), (Rows.SAMPLED, (9, 2, 9)), (Rows.SPANS, (9, 9, 2))):
        for times in (1, 2, 3):
            out, ids = torch.zeros(4 * times, 8), torch.arange(4 * times)
            with ops.record(rows, 4) as instructions:
                ops.gather_rows(out, x, ids)
            ops.run(Program(instructions), BatchSizes(*batch))
            assert torch.equal(out[: 2 * times], x[: 2 * times])
            assert not bool(out[2 * times :].any())


@pytest.mark.proof
@every_target
def test_every_instruction_set_computes_the_same(target: str) -> None:
    """Built for less than this machine has, down to the portable form, it is right as well."""
    opened = NativeOps(kernels_for(target), 2)
    try:
        for dtype in BOUNDS:
            for is_int8 in (False, True):
                for seed, (rows, hidden, inner) in enumerate([(1, 64, 32), (9, 33, 17), (70, 16, 40)]):
                    check(
                        opened, dtype, rows, 7, 3, hidden, inner, renormalize=seed > 0, has_bias=seed > 1,
                        kind="gelu_tanh" if seed else "silu", seed=seed, is_int8=is_int8,
                    )  # fmt: skip
    finally:
        opened.close()
