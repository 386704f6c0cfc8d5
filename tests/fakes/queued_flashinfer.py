"""The emulation of FlashInfer on the emulated device: a call is one operation in the device's queue, as a kernel is, instead
of the torch operations that it is made of here. What the real ones do at once, on the host, happens at once."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ferrum_rt.interfaces.types import DataType
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.cuda.sampling import draw_in_graph
from ferrum_rt.runtime.loading.cuda_backend import CudaBackend
from tests.fakes import flashinfer
from tests.fakes.device import EmulatedDevice, poison

IN_PLACE = (
    "rmsnorm",
    "gemma_rmsnorm",
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "silu_and_mul",
    "gelu_tanh_and_mul",
    "apply_rope_with_cos_sin_cache_inplace",
)


class QueuedFlashInfer:
    """What CudaOps and ``draw_in_graph`` call of the module. ``num_calls`` counts by name what was captured or enqueued."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.num_calls: dict[str, int] = {}
        self._device = device

    def __getattr__(self, name: str) -> Any:
        if name in IN_PLACE:
            return partial(self._call, name)
        if name in ("top_k_renorm_probs", "top_p_renorm_probs"):
            return partial(self._renorm, name)
        if name == "fast_decode_plan":
            return self._fast_decode_plan
        return partial(_Wrapper, self._device, getattr(flashinfer, name))

    def _fast_decode_plan(self, wrapper: "_Wrapper", *args: Any, **kwargs: Any) -> None:
        assert not self._device.is_capturing, "a plan is no part of a graph"
        self._device.enqueue(partial(flashinfer.fast_decode_plan, wrapper.emulation, *args, **kwargs))

    def _call(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.num_calls[name] = self.num_calls.get(name, 0) + 1
        self._device.enqueue(partial(getattr(flashinfer, name), *args, **kwargs))

    def _renorm(self, name: str, probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch._C._DisableTorchDispatch():
            out = poison(torch.empty_like(probs))

        def run() -> None:
            out.copy_(getattr(flashinfer, name)(probs, *args, **kwargs))

        self._device.enqueue(run)
        return out


class _Wrapper:
    """Made at once, which waits for the device and so cannot be in a graph; planned and run in the queue. Lengths are the
    host's, and read when ``plan`` is called."""

    def __init__(self, device: EmulatedDevice, kind: Any, *args: Any, **kwargs: Any) -> None:
        self._device = device
        device.sync()
        with torch._C._DisableTorchDispatch():
            self.emulation = kind(*args, **kwargs)

    def reset_workspace_buffer(self, *args: Any) -> None:
        self.emulation.reset_workspace_buffer(*args)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        assert not self._device.is_capturing, "a plan is no part of a graph"
        self._device.enqueue(partial(self.emulation.plan, *args, **kwargs))

    def run(self, *args: Any, **kwargs: Any) -> None:
        self._device.enqueue(partial(self.emulation.run, *args, **kwargs))


def queued_backend(device: EmulatedDevice) -> CudaBackend:
    """The real CudaOps and the real draw on an emulated GPU."""
    kernels = QueuedFlashInfer(device)

    def make_ops(block_size: int, kv_dtype: torch.dtype, dtype: torch.dtype) -> CudaOps:
        return CudaOps("cpu", block_size=block_size, kv_dtype=kv_dtype, dtype=dtype, flashinfer=kernels)

    return CudaBackend(
        device,
        make_ops,
        partial(draw_in_graph, flashinfer=kernels),
        frozenset({DataType.BFLOAT16, DataType.FLOAT16}),
    )
