"""The tile for AMX, on an emulation of its instructions; and that it compiles to the real ones."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ferrum_rt.kernels.cpu import NativeOps, build
from ferrum_rt.kernels.cpu.build import TARGETS, Kernels, find_compiler, load_kernels
from ferrum_rt.kernels.cpu.program import Kind
from tests.kernels.test_native_linear import check_linear, random

EMULATION = Path(__file__).parent / "emulated_amx.h"
FLAGS = TARGETS["x86-64-v4-amx"].flags
pytestmark = pytest.mark.proof


def compiler_knows(*flags: str) -> bool:
    try:
        command = [find_compiler(), *flags, "-x", "c++", "-c", "/dev/null", "-o", "/dev/null"]
    except OSError:
        return False
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeOps]:
    here = load_kernels()
    if here is None or "bf16" not in here.instruction_set:
        pytest.skip("needs a C++ compiler, and a processor with AVX-512 and its bfloat16")
    kernels = Kernels(build(tmp_path_factory.mktemp("kernels"), ("-march=native", "-include", str(EMULATION))))
    assert kernels.instruction_set.startswith("amx")
    opened = NativeOps(kernels, 2)
    yield opened
    opened.close()


@pytest.mark.parametrize("is_int8", [False, True])
def test_linear_is_that_of_float64(ops: NativeOps, is_int8: bool) -> None:
    """Of any height, and of any number of granules: whole tiles of them, less than one, and what is left over."""
    for seed, (rows, inner, outer) in enumerate(
        [(1, 64, 32), (13, 32, 65), (14, 31, 40), (16, 300, 40), (29, 128, 96), (70, 1, 5), (3, 600, 33)]
    ):
        check_linear(ops, torch.bfloat16, rows, inner, outer, is_int8=is_int8, has_bias=True, seed=seed)


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_does_not_depend_on_its_batch(ops: NativeOps, is_int8: bool) -> None:
    """A row's result is the same to the bit in tiles of any height; in int8 it is also that without AMX."""
    x, weight = random(30, 210, dtype=torch.bfloat16, seed=1), random(70, 210, dtype=torch.bfloat16, seed=2)
    packed = ops.pack(weight, None, Kind.INT8) if is_int8 else ops.pack_linear(weight, None)
    whole = torch.empty((30, 70), dtype=torch.bfloat16)
    ops.linear(whole, x, packed)
    for rows in range(1, 30):
        out = torch.empty((rows, 70), dtype=torch.bfloat16)
        ops.linear(out, x[30 - rows :], packed)
        assert torch.equal(out, whole[30 - rows :]), rows
    if is_int8:
        kernels = load_kernels()
        assert kernels is not None
        without, out = NativeOps(kernels, 1), torch.empty_like(whole)
        without.linear(out, x, packed)
        without.close()
        assert torch.equal(out, whole)


def test_a_row_that_is_no_number_spoils_no_other(ops: NativeOps) -> None:
    """NaN and infinity stay in their rows, also beside the zeros that fill up a tile."""
    x, weight = random(5, 70, dtype=torch.bfloat16, seed=1), random(40, 70, dtype=torch.bfloat16, seed=2)
    packed = ops.pack_linear(weight, None)
    sound, spoilt = torch.empty(5, 40).bfloat16(), torch.empty(5, 40).bfloat16()
    ops.linear(sound, x, packed)
    x[1, 7], x[3, 69] = torch.nan, torch.inf
    ops.linear(spoilt, x, packed)
    assert not bool(spoilt[[1, 3]].isfinite().any())
    assert torch.equal(spoilt[[0, 2, 4]], sound[[0, 2, 4]])


def test_it_compiles_to_the_real_instructions(tmp_path: Path) -> None:
    """For a processor with AMX, named or described by its features."""
    if not compiler_knows(*FLAGS):
        pytest.skip("needs a C++ compiler that knows AMX")
    library = build(tmp_path, FLAGS)
    objdump = shutil.which("objdump")
    if objdump is not None:
        listing = subprocess.run(
            [objdump, "-d", str(library)], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        assert {"ldtilecfg", "tdpbf16ps", "tdpbusd", "tilestored", "tilerelease"} <= set(listing.split())
