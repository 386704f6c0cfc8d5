"""What loading a model comes to on any device: its type, its length, its pages."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.kv_dtype import KV_DTYPES, KvDtypeKind
from ferrum_rt.interfaces.types import DataType, Device, ModelId, ModelInfo
from ferrum_rt.kernels.batch import KvPages, allocate_pages
from ferrum_rt.runtime.loading.progress import progress_bar
from ferrum_rt.runtime.models.families import DecoderSpec
from ferrum_rt.runtime.models.weights import WeightReader

# Of the activations, and of the weights that are not int8.
TORCH_DTYPES = {
    DataType.FLOAT32: torch.float32,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT16: torch.float16,
    DataType.INT8: torch.bfloat16,
}
KV_TORCH_DTYPES = {
    KvDtypeKind.FLOAT32: torch.float32,
    KvDtypeKind.BFLOAT16: torch.bfloat16,
    KvDtypeKind.FLOAT16: torch.float16,
    KvDtypeKind.FP8: torch.float8_e4m3fn,
    KvDtypeKind.INT8: torch.int8,
}


@dataclass(frozen=True, slots=True)
class LoadJob:
    """One model to load. ``name`` is what a user knows it by; ``dtype`` what was asked for, or the checkpoint's own."""

    config: EngineConfig
    spec: DecoderSpec
    name: str
    dtype: DataType
    open_reader: Callable[[], WeightReader]

    def loading_bar(self) -> Callable[[int, int], None]:
        return progress_bar(f"loading {self.name}", "layers", enabled=self.config.monitoring.progress)

    def model_info(self, num_parameters: int, max_model_len: int, dtype: DataType, device: Device) -> ModelInfo:
        return ModelInfo(
            id=ModelId(self.config.model.source or "demo"),
            type=self.spec.type,
            num_parameters=num_parameters,
            num_layers=len(self.spec.layers),
            hidden_size=self.spec.hidden_size,
            vocab_size=self.spec.vocab_size,
            max_model_len=max_model_len,
            dtype=dtype,
            device=device,
        )


def wanted_kv_dtype(config: EngineConfig, dtype: DataType) -> KvDtypeKind:
    """What is asked for, else the type of the activations."""
    activations = DataType.BFLOAT16 if dtype is DataType.INT8 else dtype
    return config.kv_cache.dtype or KvDtypeKind(activations.value)


def wanted_length(config: EngineConfig, spec: DecoderSpec) -> int:
    """The longest sequence, in tokens, if the pages can hold it. Raises ConfigError."""
    wanted_len = config.model.max_model_len or spec.max_positions
    if wanted_len > spec.max_positions:
        raise ConfigError(
            f"model.max_model_len is {wanted_len}, but this model was made for at most {spec.max_positions} tokens"
        )
    return wanted_len


def bytes_per_page(config: EngineConfig, spec: DecoderSpec, kv_kind: KvDtypeKind) -> int:
    """Over all layers."""
    kv_dtype = KV_DTYPES[kv_kind]
    per_head = spec.head_dim * kv_dtype.itemsize + kv_dtype.scale_bytes
    return 2 * len(spec.layers) * spec.num_kv_heads * per_head * config.kv_cache.block_size


def fit_pages(
    config: EngineConfig, wanted_len: int, page_bytes: int, budget: int, field: str = "memory.kv_cache_bytes"
) -> tuple[int, int]:
    """(max_model_len, num_pages) for ``budget`` bytes, which ``field`` sets. Raises ConfigError."""
    num_pages, block_size = config.kv_cache.num_pages, config.kv_cache.block_size
    if num_pages is None:
        most = config.scheduler.max_running_requests * -(-wanted_len // block_size)
        num_pages = min(most, budget // page_bytes)
    room = num_pages * block_size
    if room < 1:
        raise ConfigError(
            f"{field} is too small: one page takes {page_bytes} bytes, and {max(0, budget)} are left for pages"
        )
    if config.model.max_model_len is not None and wanted_len > room:
        raise ConfigError(
            f"model.max_model_len is {wanted_len}, but the KV cache's {num_pages} pages of {block_size} tokens hold {room}; "
            f"raise {field} or kv_cache.num_pages, or lower max_model_len"
        )
    return min(wanted_len, room), num_pages


def allocate_cache(spec: DecoderSpec, num_tokens: int, kv_kind: KvDtypeKind, device: str) -> list[KvPages]:
    """Pages for ``num_tokens`` tokens in every layer. Raises ConfigError."""
    dtype = KV_TORCH_DTYPES[kv_kind]
    try:
        return [allocate_pages(num_tokens, spec.num_kv_heads, spec.head_dim, dtype, device) for _ in spec.layers]
    except MemoryError as error:
        raise ConfigError(f"kv_cache.num_pages: no memory for the keys and values of {num_tokens} tokens") from error
