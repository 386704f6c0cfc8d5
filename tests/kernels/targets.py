"""The native kernels, for this machine and for other instruction sets."""

import pytest

from ferrum_rt.kernels.cpu.build import TARGETS, Kernels, _cache_directory, _processor, build, load_kernels

every_target = pytest.mark.parametrize("target", ["x86-64-v4", "x86-64-v3", "x86-64"])


def needed_kernels() -> Kernels:
    """This machine's; without a compiler the test is skipped."""
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    return kernels


def kernels_for(target: str) -> Kernels:
    """Compiled once, into the user's cache, where the other modules' tests find them; the test is skipped where they could
    not run, or not be compiled."""
    needed_kernels()
    if missing := TARGETS[target].needs - set(_processor().get("flags", "").split()):
        pytest.skip(f"this machine has no {', '.join(sorted(missing))}")
    return Kernels(build(_cache_directory(), TARGETS[target].flags))
