"""From a configuration to a model that can run: find the directory, read it, size the page pool."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import (
    ModelError,
    RequestValidationError,
    TokenizerError,
    Unsupported,
)
from ferrum_rt.interfaces.grammar import GrammarCompiler
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from ferrum_rt.interfaces.model_executor import ModelExecutor
from ferrum_rt.interfaces.requests import check_sampling
from ferrum_rt.interfaces.tokenizer import Tokenizer
from ferrum_rt.interfaces.types import DataType, Device, ModelSource, SamplingParams, TokenId
from ferrum_rt.kernels.cpu import open_ops
from ferrum_rt.runtime.execution.executor import DecoderExecutor
from ferrum_rt.runtime.execution.host_inputs import HostInputs
from ferrum_rt.runtime.execution.sampler import BatchSampler
from ferrum_rt.runtime.execution.step_runner import build_runner
from ferrum_rt.runtime.loading.cuda_backend import CudaBackend, build_cuda_executor, find_cuda
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.load_job import (
    TORCH_DTYPES,
    LoadJob,
    allocate_cache,
    bytes_per_page,
    fit_pages,
    wanted_kv_dtype,
    wanted_length,
)
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.models.decoder import Decoder, load_weights
from ferrum_rt.runtime.models.families import DecoderSpec, parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader, DummyReader
from ferrum_rt.runtime.text.grammar import LlGrammarCompiler
from ferrum_rt.runtime.text.tool_calls import ToolFormat, detect_format

DEMO_MODEL = Path(__file__).parents[2] / "demo_model"

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


def load_model(config: EngineConfig, find_cuda: Callable[[Device], CudaBackend | None] = find_cuda) -> LoadedModel:
    """Load what ``config`` names. Blocking and slow: call it in the executor's thread. ``find_cuda`` says what to run on,
    None for the CPU.

    Raises ConfigError, DeviceError, ModelError or TokenizerError, and then nothing is left behind.
    """
    cuda = find_cuda(config.backend.device)
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
        executor=_build_executor(directory, config, raw, spec, cuda),
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


def _build_executor(
    directory: Path, config: EngineConfig, raw: dict[str, Any], spec: DecoderSpec, cuda: CudaBackend | None
) -> ModelExecutor:
    is_dummy = config.model.load_format == "dummy"
    device = "cpu" if cuda is None else cuda.device.name
    job = LoadJob(
        config=config,
        spec=spec,
        name=directory.name,
        dtype=_dtype(raw, config.backend.dtype),
        open_reader=lambda: DummyReader(spec.norm_offset, device) if is_dummy else CheckpointReader(directory, device),
    )
    return build_cuda_executor(job, cuda) if cuda is not None else _build_cpu_executor(job)


def _build_cpu_executor(job: LoadJob) -> DecoderExecutor:
    config, spec, dtype = job.config, job.spec, job.dtype
    torch_dtype, is_int8 = TORCH_DTYPES[dtype], dtype is DataType.INT8
    kv_kind = wanted_kv_dtype(config, dtype)
    wanted_len = wanted_length(config, spec)
    budget = config.memory.kv_cache_bytes or available_memory() // 4
    page_bytes = bytes_per_page(config, spec, kv_kind)
    max_model_len, num_pages = fit_pages(config, wanted_len, page_bytes, budget)
    num_slots, block_size = config.scheduler.max_running_requests, config.kv_cache.block_size
    max_tokens = config.batching.max_batched_tokens
    inputs = HostInputs(num_slots, max_tokens, -(-max_model_len // block_size), block_size)
    with torch.inference_mode(), ExitStack() as undo:
        ops = open_ops(config.backend.num_threads or torch.get_num_threads())
        undo.callback(ops.close)
        weights = load_weights(
            spec,
            job.open_reader(),
            ops,
            torch_dtype,
            max_model_len,
            job.loading_bar(),
            is_int8=is_int8,
            has_fp8_pages=kv_kind is KvDtypeKind.FP8,
        )
        decoder = Decoder(spec, weights, ops, torch_dtype, max_tokens, num_slots)
        cache = allocate_cache(spec, num_pages * block_size, kv_kind, ops.device)
        executor = DecoderExecutor(
            job.model_info(weights.num_parameters, max_model_len, dtype, Device.CPU),
            decoder,
            ops,
            inputs,
            build_runner(decoder, ops, cache, inputs),
            BatchSampler(num_slots, spec.vocab_size, max_model_len, ops.device),
            cache,
            num_slots=num_slots,
            num_pages=num_pages,
            block_size=block_size,
            num_host_pages=(config.memory.swap_bytes or 0) // page_bytes,
        )
        undo.pop_all()
        return executor


def _dtype(raw: dict[str, Any], wanted: DataType | None) -> DataType:
    if wanted is not None:
        return wanted
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    # Of weights that are int8 already we do not know the scales.
    if name not in [dtype for dtype in DataType if dtype is not DataType.INT8]:
        raise Unsupported(f"config.json: dtype {name!r} is not supported; choose one with dtype=")
    return DataType(name)


def available_memory() -> int:
    """Bytes that can be had without pushing others out."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
