"""Kernels for other instruction sets than this machine's best."""

from ferrum_rt.kernels.cpu.build import Kernels, _cache_directory, build


def kernels_for(flags: str) -> Kernels:
    """Compiled once, into the user's cache, where the other modules' tests find them."""
    return Kernels(build(_cache_directory(), (flags,)))
