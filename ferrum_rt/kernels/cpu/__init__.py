"""Kernels for the CPU: native ones, and torch's where there is no compiler."""

import os

from ferrum_rt.kernels.cpu.build import build, load_kernels
from ferrum_rt.kernels.cpu.ops import NativeOps
from ferrum_rt.kernels.cpu.torch_ops import TorchCpuOps

__all__ = ["NativeOps", "TorchCpuOps", "build", "load_kernels", "open_cpu_ops"]


def open_cpu_ops() -> NativeOps | TorchCpuOps:
    """The fastest there are, on as many threads as this process has cores."""
    kernels = load_kernels()
    return TorchCpuOps() if kernels is None else NativeOps(kernels, len(os.sched_getaffinity(0)))
