"""The native linear layers."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.cpu import NativeOps, load_kernels
from ferrum_rt.kernels.cpu.program import Kind
from ferrum_rt.kernels.reference import ReferenceOps
from tests.kernels.targets import every_target, kernels_for, needed_kernels

# Of the largest output: one rounding to the type, and for float32 the order of adding up.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
dtypes = st.sampled_from(list(BOUNDS))


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    kernels = needed_kernels()
    opened = NativeOps(kernels, 2)
    yield opened
    opened.close()


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and each row's scale."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / 127.0
    factor = torch.where(scale > 0, 1.0 / scale, 0.0)
    return (x.float() * factor).round().clamp(-127, 127).double(), scale.double()


def check_linear(
    ops: NativeOps, dtype: torch.dtype, rows: int, inner: int, outer: int, *, is_int8: bool, has_bias: bool, seed: int
) -> None:
    wide_x = random(rows, inner + 3, dtype=dtype, seed=seed)
    x, weight = wide_x[:, 1 : inner + 1], random(outer, inner, dtype=dtype, seed=seed + 1)
    bias = random(outer, dtype=dtype, seed=seed + 2) if has_bias else None
    wide_out = torch.full((rows, outer + 5), 7.0, dtype=dtype)
    packed = ops.pack(weight, bias, Kind.INT8) if is_int8 else ops.pack_linear(weight, bias)
    ops.linear(wide_out[:, 2 : outer + 2], x, packed)
    if is_int8:
        (x_rounded, x_scale), (w_rounded, w_scale) = quantized(x), quantized(weight)
        expected = (x_rounded @ w_rounded.T) * x_scale * w_scale.T
    else:
        expected = x.double() @ weight.double().T
    expected = expected if bias is None else expected + bias.double()
    error = (wide_out[:, 2 : outer + 2].double() - expected).abs().max()
    assert error <= BOUNDS[dtype] * max(1.0, float(expected.abs().max()))
    beside = torch.cat([wide_out[:, :2], wide_out[:, outer + 2 :]], dim=1)
    assert bool((beside == 7).all())


@settings(max_examples=150, deadline=None)
@given(
    dtype=dtypes, rows=st.integers(1, 70), inner=st.integers(1, 300), outer=st.integers(1, 130), is_int8=st.booleans(),
    has_bias=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_linear_is_that_of_float64(
    ops: NativeOps, dtype: torch.dtype, rows: int, inner: int, outer: int, is_int8: bool, has_bias: bool, seed: int
) -> None:
    """x @ weight.T + bias for any shape and stride, and nothing beside the output is written; int8 is exact but for its
    scales."""
    check_linear(ops, dtype, rows, inner, outer, is_int8=is_int8, has_bias=has_bias, seed=seed)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_int8_is_that_of_the_reference(ops: NativeOps, dtype: torch.dtype) -> None:
    """To the bit, also for numbers that are too small for a scale."""
    for rows, inner, outer in [(1, 96, 80), (5, 7, 33), (17, 3000, 40)]:
        x, weight = random(rows, inner, dtype=dtype, seed=1), random(outer, inner, dtype=dtype, seed=2)
        x[-1], weight[-1], bias = 1e-38, 1e-38, random(outer, dtype=dtype, seed=3)
        results = []
        for each in (ops, ReferenceOps()):
            results.append(torch.empty((rows, outer), dtype=dtype))
            each.linear(results[-1], x, each.pack_linear(weight, bias, is_int8=True))
        assert torch.equal(*results)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_row_does_not_depend_on_its_batch(ops: NativeOps, dtype: torch.dtype, is_int8: bool) -> None:
    """In a batch of 1 to 64, and on one thread or three, a row's result is the same to the bit."""
    x, weight = random(64, 200, dtype=dtype, seed=1), random(100, 200, dtype=dtype, seed=2)
    packed = ops.pack(weight, None, Kind.INT8) if is_int8 else ops.pack_linear(weight, None)
    whole = torch.empty((64, 100), dtype=dtype)
    ops.linear(whole, x, packed)
    for rows in range(1, 64):
        out = torch.empty((rows, 100), dtype=dtype)
        ops.linear(out, x[64 - rows :], packed)
        assert torch.equal(out, whole[64 - rows :]), rows
    kernels = needed_kernels()
    for num_threads in (1, 3):
        other, out = NativeOps(kernels, num_threads), torch.empty_like(whole)
        other.linear(out, x, packed)
        other.close()
        assert torch.equal(out, whole)


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_that_is_no_number_spoils_no_other(ops: NativeOps, is_int8: bool) -> None:
    """NaN or infinity in one row come out of that row, not as numbers, and the other rows are as they were."""
    x, weight = random(5, 64, dtype=torch.float32, seed=1), random(40, 64, dtype=torch.float32, seed=2)
    packed = ops.pack(weight, None, Kind.INT8) if is_int8 else ops.pack_linear(weight, None)
    sound, spoilt = torch.empty(5, 40), torch.empty(5, 40)
    ops.linear(sound, x, packed)
    x[1, 7], x[3, 63] = torch.nan, torch.inf
    ops.linear(spoilt, x, packed)
    assert not bool(spoilt[[1, 3]].isfinite().any())
    assert torch.equal(spoilt[[0, 2, 4]], sound[[0, 2, 4]])


def test_without_a_compiler_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No compiler is one warning, however often they are asked for, and no error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "ferrum_rt"):
            assert load_kernels() is None
            assert load_kernels() is None
    finally:
        load_kernels.cache_clear()
    assert [("no C++ compiler found" in record.getMessage()) for record in caplog.records] == [True]


def test_a_cache_that_others_may_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies in the cache is loaded into the process, so it must be ours alone."""
    directory = tmp_path / "ferrum_rt" / "kernels"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "ferrum_rt"):
            assert load_kernels() is None
    finally:
        load_kernels.cache_clear()
    assert "can be written to by others" in caplog.text


@pytest.mark.proof
@every_target
def test_every_instruction_set_computes_the_same(target: str) -> None:
    """Built for less than this machine has, down to the portable form, it is right as well."""
    kernels = kernels_for(target)
    assert kernels.lanes == {"x86-64-v4": 16, "x86-64-v3-vnni": 8, "x86-64-v3": 8, "x86-64": 4}[target]
    opened = NativeOps(kernels, 2)
    try:
        for dtype in BOUNDS:
            for seed, (rows, inner, outer) in enumerate([(1, 96, 80), (7, 33, 65), (16, 300, 40), (70, 17, 5)]):
                for is_int8 in (False, True):
                    check_linear(opened, dtype, rows, inner, outer, is_int8=is_int8, has_bias=True, seed=seed)
    finally:
        opened.close()
