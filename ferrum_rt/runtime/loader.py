"""From a configuration to a model that can run: find the directory, read it, size the page pool."""

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import torch

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import (
    ConfigError,
    DeviceError,
    ModelError,
    RequestValidationError,
    TokenizerError,
    Unsupported,
)
from ferrum_rt.interfaces.grammar import GrammarCompiler
from ferrum_rt.interfaces.kv_dtype import KV_DTYPES, KvDtypeKind
from ferrum_rt.interfaces.model_executor import ModelExecutor
from ferrum_rt.interfaces.requests import check_sampling
from ferrum_rt.interfaces.tokenizer import Tokenizer
from ferrum_rt.interfaces.types import DataType, Device, ModelId, ModelInfo, ModelSource, SamplingParams, TokenId
from ferrum_rt.kernels.batch import KvPages, allocate_pages
from ferrum_rt.kernels.cpu import CpuOps
from ferrum_rt.runtime.executor import DecoderExecutor
from ferrum_rt.runtime.grammar import LlGrammarCompiler
from ferrum_rt.runtime.json_file import read_json
from ferrum_rt.runtime.models.decoder import Decoder, load_weights
from ferrum_rt.runtime.models.families import DecoderSpec, parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader, DummyReader
from ferrum_rt.runtime.progress import loading_bar
from ferrum_rt.runtime.sampler import BatchSampler
from ferrum_rt.runtime.tokenizer import HfTokenizerFactory
from ferrum_rt.runtime.tool_calls import ToolFormat, detect_format

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"

_TORCH_DTYPES = {
    DataType.FLOAT32: torch.float32,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT16: torch.float16,
}
_KV_TORCH_DTYPES = {
    KvDtypeKind.FLOAT32: torch.float32,
    KvDtypeKind.BFLOAT16: torch.bfloat16,
    KvDtypeKind.FLOAT16: torch.float16,
    KvDtypeKind.FP8: torch.float8_e4m3fn,
    KvDtypeKind.INT8: torch.int8,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model ready to serve. ``tokenizer`` is None for dummy weights without one: such a model takes and gives token ids.
    ``defaults`` are what the model's generation_config.json recommends. ``tool_format`` is how it writes tool calls, if its
    chat template shows that."""

    executor: ModelExecutor
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[TokenId]
    defaults: SamplingParams
    grammars: GrammarCompiler | None = None
    tool_format: ToolFormat | None = None


def load_model(config: EngineConfig) -> LoadedModel:
    """Load what ``config`` names. Blocking and slow: call it in the executor's thread.

    Raises ConfigError, DeviceError, ModelError or TokenizerError, and then nothing is left behind.
    """
    directory = resolve_model(config.model.source)
    raw = read_json(directory / "config.json", ModelError)
    try:
        spec = parse_config(raw)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path, ModelError) if generation_path.is_file() else {}
    eos = _eos_token_ids(raw, generation)
    tokenizer = _load_tokenizer(directory, config, spec, eos)
    if tokenizer is not None:
        eos = eos or tokenizer.info.special_tokens.eos
    defaults = _sampling_defaults(generation_path, generation)
    grammars, tool_format = None, None
    if tokenizer is not None:
        grammars = LlGrammarCompiler(directory / "tokenizer.json", spec.vocab_size, eos)
        tool_format = detect_format(tokenizer.info.chat_template or "")
    return LoadedModel(
        executor=_build_executor(directory, config, raw, spec),
        tokenizer=tokenizer,
        eos_token_ids=frozenset(eos),
        defaults=defaults,
        grammars=grammars,
        tool_format=tool_format,
    )


def model_source(source: str | None) -> ModelSource:
    """Which kind of place ``source`` names."""
    if source is None:
        return ModelSource.DEMO
    if Path(source).exists() or not _HUB_ID.fullmatch(source):
        return ModelSource.DIRECTORY
    return ModelSource.HUB


def resolve_model(source: str | None) -> Path:
    """The directory that holds the model; fetched from the hub if ``source`` is an id of one."""
    kind = model_source(source)
    if source is None:
        return DEMO_MODEL
    if kind is ModelSource.HUB:
        return _fetch(source)
    directory = Path(source)
    if not directory.is_dir():
        raise ModelError(f"{source}: no such directory")
    return directory


def _fetch(source: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{source}: no such directory; to fetch it from the hub install the extra: pip install 'ferrum-rt[hub]'"
        ) from error
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ModelError(f"{source}: no such directory, and it cannot be fetched from the hub: {error}") from error


def _eos_token_ids(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[TokenId, ...]:
    given = generation.get("eos_token_id", raw.get("eos_token_id"))
    ids = given if isinstance(given, list) else [given]
    return tuple(TokenId(token) for token in ids if isinstance(token, int))


def _load_tokenizer(directory: Path, config: EngineConfig, spec: DecoderSpec, eos: tuple[TokenId, ...]) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    if config.model.load_format == "dummy" and not path.is_file():
        return None
    tokenizer = HfTokenizerFactory(eos).load(directory)
    if tokenizer.info.vocab_size > spec.vocab_size:
        raise TokenizerError(
            f"{path}: the tokenizer knows {tokenizer.info.vocab_size} tokens, but the model's embedding has "
            f"{spec.vocab_size} rows; they do not belong together"
        )
    return tokenizer


def _sampling_defaults(path: Path, generation: dict[str, Any]) -> SamplingParams:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        given = {"temperature": 0.0}
    try:
        defaults = msgspec.convert(given, SamplingParams, strict=False)
        check_sampling(defaults)
        return defaults
    except (msgspec.ValidationError, RequestValidationError) as error:
        raise ModelError(f"{path}: {error}") from error


def _build_executor(directory: Path, config: EngineConfig, raw: dict[str, Any], spec: DecoderSpec) -> ModelExecutor:
    if config.backend.device is Device.CUDA:
        raise DeviceError("device 'cuda': the CUDA executor is not part of this version; use 'cpu' or 'auto'")
    dtype_name = config.backend.dtype or _checkpoint_dtype(raw)
    dtype = _TORCH_DTYPES[dtype_name]
    kv_kind = config.kv_cache.dtype or KvDtypeKind(dtype_name.value)
    max_model_len, num_pages = _size_cache(config, spec, kv_kind)
    num_slots, block_size = config.scheduler.max_running_requests, config.kv_cache.block_size

    ops = CpuOps()
    is_dummy = config.model.load_format == "dummy"
    reader = DummyReader(spec.norm_offset) if is_dummy else CheckpointReader(directory)
    progress = loading_bar(directory.name, enabled=config.monitoring.progress)
    with torch.inference_mode():
        weights = load_weights(spec, reader, ops, dtype, max_model_len, progress)
        decoder = Decoder(spec, weights, ops, dtype, config.batching.max_batched_tokens, num_slots)
        cache = _allocate_cache(spec, num_pages * block_size, _KV_TORCH_DTYPES[kv_kind], ops.device)
        return DecoderExecutor(
            ModelInfo(
                id=ModelId(config.model.source or "demo"),
                type=spec.type,
                num_parameters=weights.num_parameters,
                num_layers=len(spec.layers),
                hidden_size=spec.hidden_size,
                vocab_size=spec.vocab_size,
                max_model_len=max_model_len,
                dtype=dtype_name,
                device=Device.CPU,
            ),
            decoder,
            BatchSampler(num_slots, spec.vocab_size, max_model_len, ops.device),
            cache,
            num_slots=num_slots,
            num_pages=num_pages,
            block_size=block_size,
        )


def _allocate_cache(spec: DecoderSpec, num_tokens: int, dtype: torch.dtype, device: str) -> list[KvPages]:
    try:
        return [allocate_pages(num_tokens, spec.num_kv_heads, spec.head_dim, dtype, device) for _ in spec.layers]
    except MemoryError as error:
        raise ConfigError(f"kv_cache.num_pages: no memory for the keys and values of {num_tokens} tokens") from error


def _checkpoint_dtype(raw: dict[str, Any]) -> DataType:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    try:
        return DataType(name)
    except ValueError as error:
        raise Unsupported(f"config.json: dtype {name!r} is not supported; choose one with dtype=") from error


def _size_cache(config: EngineConfig, spec: DecoderSpec, kv_kind: KvDtypeKind) -> tuple[int, int]:
    """(max_model_len, num_pages)."""
    kv_dtype, block_size = KV_DTYPES[kv_kind], config.kv_cache.block_size
    per_head = spec.head_dim * kv_dtype.itemsize + kv_dtype.scale_bytes
    page_bytes = 2 * len(spec.layers) * spec.num_kv_heads * per_head * block_size
    wanted_len = config.model.max_model_len or spec.max_positions
    if wanted_len > spec.max_positions:
        raise ConfigError(
            f"model.max_model_len is {wanted_len}, but this model was made for at most {spec.max_positions} tokens"
        )
    num_pages = config.kv_cache.num_pages
    if num_pages is None:
        budget = config.memory.kv_cache_bytes or available_memory() // 4
        most = config.scheduler.max_running_requests * -(-wanted_len // block_size)
        num_pages = min(most, budget // page_bytes)
    room = num_pages * block_size
    if room < 1:
        raise ConfigError(f"memory.kv_cache_bytes is too small: one page takes {page_bytes} bytes")
    if config.model.max_model_len is not None and wanted_len > room:
        raise ConfigError(
            f"model.max_model_len is {wanted_len}, but the KV cache's {num_pages} pages of {block_size} tokens hold {room}; "
            "raise memory.kv_cache_bytes or kv_cache.num_pages, or lower max_model_len"
        )
    return min(wanted_len, room), num_pages


def available_memory() -> int:
    """Bytes that can be had without pushing others out."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
