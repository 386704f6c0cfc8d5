"""Kernels for the CPU: native ones, compiled for the machine at hand, or torch's where there is no compiler."""

from ferrum_rt.kernels.cpu.build import build, load_kernels
from ferrum_rt.kernels.cpu.ops import NativeOps
from ferrum_rt.kernels.cpu.torch_ops import TorchCpuOps

CpuOps = NativeOps | TorchCpuOps

__all__ = ["CpuOps", "NativeOps", "TorchCpuOps", "build", "load_kernels", "open_ops"]


def open_ops(num_threads: int) -> CpuOps:
    """The fastest there are; to be closed."""
    kernels = load_kernels()
    return TorchCpuOps() if kernels is None else NativeOps(kernels, num_threads)
