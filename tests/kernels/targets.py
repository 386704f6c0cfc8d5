"""The native kernels, for this machine and for other instruction sets."""

import pytest

from ferrum_rt.kernels.cpu.build import Kernels, _cache_directory, build, load_kernels


def needed_kernels() -> Kernels:
    """This machine's; without a compiler the test is skipped."""
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    return kernels


def kernels_for(flags: str) -> Kernels:
    """Compiled once, into the user's cache, where the other modules' tests find them."""
    return Kernels(build(_cache_directory(), (flags,)))
