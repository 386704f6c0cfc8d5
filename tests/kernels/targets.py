"""The native kernels, for this machine and for other instruction sets."""

import zlib
from pathlib import Path

import pytest

from ferrum_rt.kernels.cpu.build import TARGETS, Kernels, _cache_directory, _processor, build, load_kernels

every_target = pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3-vnni", "x86-64-v3", "x86-64"])

# Targets that a machine with AVX2 can emulate.
EMULATIONS = {"x86-64-v4": "emulated_avx512.h", "x86-64-v3-vnni": "emulated_avx_vnni.h"}


def needed_kernels() -> Kernels:
    """This machine's; without a compiler the test is skipped."""
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    return kernels


def kernels_for(target: str, *, may_emulate: bool = True) -> Kernels:
    """Compiled once, into the user's cache, where the other modules' tests find them. What the machine has not is emulated;
    what could not run, or not be compiled, is skipped."""
    needed_kernels()
    flags, features = TARGETS[target].flags, set(_processor().get("flags", "").split())
    if may_emulate and target in EMULATIONS and not TARGETS[target].needs <= features:
        emulation = Path(__file__).parent / EMULATIONS[target]
        target, version = "x86-64-v3", zlib.crc32(emulation.read_bytes())
        flags = (*TARGETS[target].flags, "-O1", "-include", str(emulation), f"-DEMULATION={version}")
    if missing := TARGETS[target].needs - features:
        pytest.skip(f"this machine has no {', '.join(sorted(missing))}")
    return Kernels(build(_cache_directory(), flags))
