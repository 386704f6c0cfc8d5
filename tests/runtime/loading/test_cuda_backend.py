"""Finding a GPU, and getting a model ready on one that is emulated."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import BackendError, ConfigError, DeviceError, RequestValidationError, Unsupported
from ferrum_rt.interfaces.types import DataType, Device
from ferrum_rt.kernels.cuda.device import CudaDevice, DeviceMemory
from ferrum_rt.runtime.execution.cuda_executor import CudaExecutor
from ferrum_rt.runtime.loading.cuda_backend import find_cuda, what_cuda_lacks
from ferrum_rt.runtime.loading.loader import load_model
from tests.fakes.device import EmulatedDevice
from tests.runtime.cuda_engines import emulated_backend

PAGE_BYTES = 2 * 6 * 2 * 64 * 4 * 16  # of the demo model in float32, at 16 tokens a page


class SizedDevice(EmulatedDevice):
    """Says what its memory is, in bytes."""

    said = DeviceMemory(total=0, free=0, reserved=0, used=0, peak=0)

    def memory(self) -> DeviceMemory:
        return self.said


@pytest.fixture
def device() -> Iterator[SizedDevice]:
    made = SizedDevice()
    made.said = DeviceMemory(total=2**30, free=2**30, reserved=0, used=0, peak=0)
    yield made
    made.close()


def load(device: EmulatedDevice, **fields: Any) -> CudaExecutor:
    config = build_config(
        None, None, {"dtype": "float32", "max_model_len": 64, "scheduler": {"max_running_requests": 2}, **fields}
    )
    executor = load_model(config, lambda kind: emulated_backend(device)).executor
    assert isinstance(executor, CudaExecutor)
    return executor


# -- finding one ----------------------------------------------------------------------------------------------------------


def test_the_cpu_is_the_cpu() -> None:
    """Nobody looks for a GPU where the CPU was asked for."""
    assert find_cuda(Device.CPU) is None


@pytest.mark.parametrize(
    ("version", "words"), [(None, "built without CUDA"), ("13.0", "nvidia-smi")], ids=["no CUDA in torch", "no GPU"]
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, version: str | None, words: str) -> None:
    """Without a GPU ``cuda`` is a DeviceError that says what to change, and ``auto`` is the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(DeviceError, match=words):
        find_cuda(Device.CUDA)
    assert find_cuda(Device.AUTO) is None


def test_flashinfer_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU and no FlashInfer the error says how to install it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert "ferrum-rt[cuda]" in (what_cuda_lacks() or "")
    with pytest.raises(DeviceError, match="FlashInfer"):
        find_cuda(Device.CUDA)
    assert find_cuda(Device.AUTO) is None


# -- types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dtype": "float16"}, "backend.dtype"),
        ({"dtype": "int8"}, "backend.dtype 'int8': on CUDA the model runs in .* or use the device 'cpu'"),
        ({"kv_dtype": "int8"}, "kv_cache.dtype"),
        ({"kv_dtype": "float16"}, "kv_cache.dtype"),
        ({"dtype": "bfloat16", "kv_dtype": "float32"}, "kv_cache.dtype"),
    ],
)
def test_types_without_kernels(device: SizedDevice, fields: dict[str, Any], field: str) -> None:
    """A type that the backend has no kernels for is Unsupported, and the message names the field."""
    with pytest.raises(Unsupported, match=field):
        load(device, **fields)


def test_real_gpus_run_16_bits() -> None:
    """On a real one float32 is not among the types."""
    device = EmulatedDevice()
    backend = emulated_backend(device)._replace(dtypes=frozenset({DataType.BFLOAT16, DataType.FLOAT16}))
    config = build_config(None, None, {"dtype": "float32"})
    with pytest.raises(Unsupported, match=r"backend\.dtype 'float32': on CUDA the model runs in bfloat16 or float16"):
        load_model(config, lambda kind: backend)
    device.close()


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pages_fit_in_what_is_left(device: SizedDevice) -> None:
    """Of the memory that may be used, what others have, the largest step's peak, and what it takes in passing once more, are
    left out; and nobody gets more pages than running requests could fill."""
    pages = 5 * PAGE_BYTES
    device.said = DeviceMemory(total=1000 * PAGE_BYTES, free=990 * PAGE_BYTES, reserved=7 * PAGE_BYTES, used=40, peak=340)
    left = int(0.01 * 1000 * PAGE_BYTES) - 3 * PAGE_BYTES - 340 - 300
    assert left // PAGE_BYTES == 6
    executor = load(device, memory={"utilization": 0.01})
    assert executor.num_pages == 6
    assert executor.memory_usage().kv_cache == 7 * PAGE_BYTES  # with the one that padding writes to
    executor.close()
    executor = load(device, memory={"utilization": 0.01, "kv_cache_bytes": pages})
    assert executor.num_pages == 5
    executor.close()
    executor = load(device, memory={"utilization": 0.9})
    assert executor.num_pages == 2 * 4
    executor.close()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"memory": {"utilization": 0.001}}, "memory.utilization"),
        ({"memory": {"kv_cache_bytes": 10}}, "memory.kv_cache_bytes"),
    ],
)
def test_no_room_for_a_page(device: SizedDevice, fields: dict[str, Any], field: str) -> None:
    """Where not one page fits the error names the setting to change, and no thread is left."""
    device.said = DeviceMemory(total=100 * PAGE_BYTES, free=100 * PAGE_BYTES, reserved=0, used=0, peak=PAGE_BYTES)
    with pytest.raises(ConfigError, match=field):
        load(device, **fields)


def test_a_model_that_does_not_fit(device: SizedDevice) -> None:
    """Memory that runs out while the model is loaded is a DeviceError that says what to lower."""
    device.fail_at, device.num_failures = 30, 10**6
    with pytest.raises(DeviceError, match=r"batching\.max_batched_tokens"):
        load(device)


@pytest.mark.parametrize("die_at", [100, 700], ids=["while weights are read", "in the step that is measured"])
def test_a_gpu_that_fails_while_loading(device: SizedDevice, die_at: int) -> None:
    """A fault of the device is a DeviceError."""
    device.die_at = die_at
    with pytest.raises(DeviceError, match="illegal memory access"):
        load(device)


@pytest.mark.slow
def test_graphs_are_captured_before_the_first_step(device: SizedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sees layers and then sizes of graphs counted."""
    bars: list[tuple[str, str]] = []
    counts: list[tuple[int, int]] = []

    def bar(what: str, unit: str, *, enabled: bool) -> Any:
        bars.append((what, unit))
        return (lambda done, total: counts.append((done, total))) if unit == "CUDA graphs" else lambda done, total: None

    monkeypatch.setattr("ferrum_rt.runtime.loading.cuda_backend.progress_bar", bar)
    monkeypatch.setattr("ferrum_rt.runtime.loading.load_job.progress_bar", bar)
    executor = load(device, scheduler={"max_running_requests": 5})
    assert [unit for _, unit in bars] == ["layers", "CUDA graphs"]
    sizes = [*executor._graphs, *executor._pieces]
    assert sizes == [1, 2, 4, 5, 16, 32, 64, 128, 256, 320, 384, 448, 512]
    assert counts == [(done, len(sizes)) for done in range(len(sizes) + 1)]
    executor.close()


# -- what the real device makes of errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_out_of_memory", "is_fatal"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), False, True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (ValueError("slots: 3 rows for a plan of 4"), False, False),
        (RuntimeError("The size of tensor a (3) must match"), False, False),
        (RequestValidationError("logits_processors[0] raised RuntimeError('CUDA error')"), False, False),
        (BackendError("out of memory"), False, False),
    ],
)
def test_errors_of_cuda(error: Exception, is_out_of_memory: bool, is_fatal: bool) -> None:
    """Memory that ran out leaves the device whole, other words of CUDA's are its end, and all else is no matter of it."""
    device = object.__new__(CudaDevice)  # a real one cannot be made here
    assert device.is_out_of_memory(error) is is_out_of_memory
    assert device.is_fatal(error) is is_fatal
