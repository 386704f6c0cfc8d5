"""Whether there is a GPU to run on, and how a model gets ready there: weights, page pool, graphs."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from ferrum_rt.interfaces.errors import DeviceError, EngineFailed, FerrumError, ResourceExhausted, Unsupported
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from ferrum_rt.interfaces.model_executor import PrefillInput, SlotAssignment, StepInput, UnifiedBatch
from ferrum_rt.interfaces.sampler import SamplingConfig, SequenceHistory
from ferrum_rt.interfaces.types import DataType, Device, RequestId, TokenId
from ferrum_rt.kernels.cuda.device import CudaDevice, StreamDevice
from ferrum_rt.runtime.execution.cuda_executor import CudaExecutor, DrawTokens, GraphOps
from ferrum_rt.runtime.execution.sampler import BatchSampler
from ferrum_rt.runtime.loading.load_job import (
    KV_TORCH_DTYPES,
    TORCH_DTYPES,
    LoadJob,
    allocate_cache,
    bytes_per_page,
    fit_pages,
    wanted_kv_dtype,
    wanted_length,
)
from ferrum_rt.runtime.loading.progress import progress_bar
from ferrum_rt.runtime.models.decoder import Decoder, load_weights


class CudaBackend(NamedTuple):
    """A device, kernels for it, and the types they take: ``make_ops(block_size, kv_dtype, dtype)``."""

    device: StreamDevice
    make_ops: Callable[[int, torch.dtype, torch.dtype], GraphOps]
    draw: DrawTokens
    dtypes: frozenset[DataType] = frozenset({DataType.BFLOAT16, DataType.FLOAT16})


def what_cuda_lacks() -> str | None:
    """Why this process cannot run on a GPU, and what to do about it; None if it can."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch was built without CUDA: install one that was built with it (see pytorch.org/get-started)"
        return "torch finds no GPU: see what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides it"
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # a version that does not fit this torch raises whatever it likes
        return f"FlashInfer cannot be imported ({error}): pip install 'ferrum-rt[cuda]'"
    return None


def find_cuda(device: Device) -> CudaBackend | None:
    """What to run on: None is the CPU. Raises DeviceError for ``cuda`` where that cannot be."""
    if device is Device.CPU:
        return None
    lacking = what_cuda_lacks()
    if lacking is None:
        return _cuda_backend()
    if device is Device.CUDA:
        raise DeviceError(f"device 'cuda': {lacking}; or use the device 'cpu'")
    return None


def _cuda_backend() -> CudaBackend:
    from ferrum_rt.kernels.cuda.ops import CudaOps
    from ferrum_rt.kernels.cuda.sampling import draw_in_graph

    device = CudaDevice()
    return CudaBackend(
        device,
        lambda block_size, kv_dtype, dtype: CudaOps(device.name, block_size=block_size, kv_dtype=kv_dtype, dtype=dtype),
        draw_in_graph,
    )


def build_cuda_executor(job: LoadJob, cuda: CudaBackend) -> CudaExecutor:
    """Weights, a step to see what memory one takes, pages in what is left, graphs. Raises ConfigError, DeviceError,
    ModelError and Unsupported."""
    dtype, kv_kind = _types(job, cuda)
    try:
        with torch.inference_mode(), cuda.device.stream():
            return _Builder(job, cuda, dtype, kv_kind).build()
    except (EngineFailed, ResourceExhausted) as error:  # of the step that is measured
        raise DeviceError(f"device 'cuda': {error}") from error
    except FerrumError:
        raise
    except Exception as error:
        if cuda.device.is_out_of_memory(error):
            raise DeviceError(
                "the GPU's memory is too small for this model, or others use it: choose a smaller model, or lower "
                f"batching.max_batched_tokens or scheduler.max_running_requests ({error})"
            ) from error
        if cuda.device.is_fatal(error):
            raise DeviceError(f"the GPU failed while the model was loaded: {error}") from error
        raise


def _types(job: LoadJob, cuda: CudaBackend) -> tuple[DataType, KvDtypeKind]:
    """Of weights and activations, and of the pages. A float32 checkpoint runs in bfloat16 unless float32 was asked for."""
    dtype, wanted = job.dtype, job.config.backend.dtype
    if wanted is None and dtype not in cuda.dtypes:
        dtype = DataType.BFLOAT16
    if dtype not in cuda.dtypes:
        known = " or ".join(sorted(cuda.dtypes))
        raise Unsupported(f"backend.dtype {dtype.value!r}: on CUDA the model runs in {known}; or use the device 'cpu'")
    kv_kind = wanted_kv_dtype(job.config, dtype)
    if kv_kind not in (KvDtypeKind(dtype.value), KvDtypeKind.FP8):
        raise Unsupported(
            f"kv_cache.dtype {kv_kind.value!r}: with a model in {dtype.value} the pages on CUDA hold {dtype.value} or fp8"
        )
    return dtype, kv_kind


class _Builder:
    """The parts of an executor, as they come about."""

    def __init__(self, job: LoadJob, cuda: CudaBackend, dtype: DataType, kv_kind: KvDtypeKind) -> None:
        self._job, self._cuda, self._dtype, self._kv_kind = job, cuda, dtype, kv_kind
        config, spec = job.config, job.spec
        self._num_slots, self._block_size = config.scheduler.max_running_requests, config.kv_cache.block_size
        self._max_tokens = config.batching.max_batched_tokens
        torch_dtype = TORCH_DTYPES[dtype]
        self._ops = cuda.make_ops(self._block_size, KV_TORCH_DTYPES[kv_kind], torch_dtype)
        self._wanted_len = wanted_length(config, spec)
        self._weights = load_weights(
            spec,
            job.open_reader(),
            self._ops,
            torch_dtype,
            self._wanted_len,
            job.loading_bar(),
            has_fp8_pages=kv_kind is KvDtypeKind.FP8,
        )
        self._decoder = Decoder(spec, self._weights, self._ops, torch_dtype, self._max_tokens, self._num_slots)

    def build(self) -> CudaExecutor:
        config = self._job.config
        page_bytes = bytes_per_page(config, self._job.spec, self._kv_kind)
        budget, field = self._budget(), "memory.utilization"
        given = config.memory.kv_cache_bytes
        if given is not None and given < budget:
            budget, field = given, "memory.kv_cache_bytes"
        max_model_len, num_pages = fit_pages(config, self._wanted_len, page_bytes, budget, field)
        executor = self._executor(max_model_len, num_pages)
        executor.capture_graphs(progress_bar("capturing", "CUDA graphs", enabled=config.monitoring.progress))
        return executor

    def _executor(self, max_model_len: int, num_pages: int) -> CudaExecutor:
        """One more page than the scheduler may use."""
        device = self._cuda.device
        cache = allocate_cache(self._job.spec, (num_pages + 1) * self._block_size, self._kv_kind, device.name)
        return CudaExecutor(
            self._job.model_info(self._weights.num_parameters, max_model_len, self._dtype, Device.CUDA),
            self._decoder,
            self._ops,
            BatchSampler(self._num_slots, self._job.spec.vocab_size, max_model_len, device.name),
            cache,
            device,
            self._cuda.draw,
            weight_bytes=self._weights.num_bytes,
            num_slots=self._num_slots,
            num_pages=num_pages,
            block_size=self._block_size,
            max_tokens=self._max_tokens,
        )

    def _budget(self) -> int:
        """Bytes for pages: what ``memory.utilization`` leaves beside all that is there while the largest step runs. The
        largest graph, whose memory stays its own, takes no more than that step did in passing."""
        device = self._cuda.device
        device.forget_peak()
        executor = self._executor(self._wanted_len, num_pages=1)
        try:
            # One that is drawn in every way that a graph can, and one that the sampler draws in all of its own.
            for sampling in (
                SamplingConfig(temperature=1.0, top_k=50, top_p=0.9),
                SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=1),
            ):
                executor.execute(self._largest_step(sampling)).result()
        finally:
            executor.close()
        device.synchronize()
        memory = device.memory()
        others = memory.total - memory.free - memory.reserved
        in_passing = memory.peak - memory.used
        device.empty_cache()
        return int(memory.total * self._job.config.memory.utilization) - others - memory.peak - in_passing

    def _largest_step(self, sampling: SamplingConfig) -> StepInput:
        """As many tokens as a step may have, over all slots, all of which are sampled. They share one page, for what they
        compute does not matter."""
        # The token that is drawn must have its place in the longest sequence too.
        length = max(1, min(self._max_tokens // self._num_slots, self._wanted_len - 1))
        tokens = [TokenId(0)] * length
        history = SequenceHistory(token_ids=tokens, num_prompt_tokens=length)
        pages = [0] * -(-length // self._block_size)
        slots = range(self._num_slots)
        return StepInput(
            [SlotAssignment(slot, RequestId(str(slot)), sampling, pages, history) for slot in slots],
            [],
            [],
            UnifiedBatch([], [PrefillInput(slot, tokens, 0, True) for slot in slots]),
        )
