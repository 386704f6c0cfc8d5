"""Kernels for NVIDIA GPUs, on FlashInfer: imported when a CudaOps is made, it compiles each kernel at its first use."""

from ferrum_rt.kernels.cuda.ops import CudaOps as CudaOps
