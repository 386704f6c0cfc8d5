"""Kernels for the CPU. Today: torch, with oneDNN's packed matmul for 16-bit weights."""

from ferrum_rt.kernels.cpu.ops import CpuOps as CpuOps
