"""Kernels for the CPU: torch's, which the engine runs on today, and native ones, which are to replace them."""

from ferrum_rt.kernels.cpu.build import build, load_kernels
from ferrum_rt.kernels.cpu.ops import NativeOps
from ferrum_rt.kernels.cpu.torch_ops import TorchCpuOps

__all__ = ["NativeOps", "TorchCpuOps", "build", "load_kernels"]
