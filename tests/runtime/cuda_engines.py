"""The CUDA backend on an emulated device, with kernels that run anywhere."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.types import DataType
from ferrum_rt.runtime.loading.cuda_backend import CudaBackend
from ferrum_rt.runtime.loading.loader import load_model
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.cuda_model import StandInOps, draw_stand_in
from tests.fakes.device import EmulatedDevice


def emulated_backend(device: EmulatedDevice) -> CudaBackend:
    """float32, so that tokens can be compared with the CPU's."""
    return CudaBackend(
        device,
        lambda block_size, kv_dtype, dtype: StandInOps(device, block_size),
        draw_stand_in,
        frozenset({DataType.FLOAT32, DataType.BFLOAT16}),
    )


@asynccontextmanager
async def emulated_engine(device: EmulatedDevice | None = None, **fields: Any) -> AsyncIterator[Runtime]:
    """The demo model on an emulated GPU."""
    made = device or EmulatedDevice()
    config = build_config(None, None, {"dtype": "float32", "max_model_len": 96, **fields})
    try:
        async with Runtime(config, partial(load_model, find_cuda=lambda device: emulated_backend(made))) as engine:
            yield engine
    finally:
        made.close()
