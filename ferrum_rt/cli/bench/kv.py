"""ferrum-rt bench kv: what the types of keys and values cost with a model, and what they do to its logits."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import msgspec
import torch
from torch import Tensor

import ferrum_rt
from ferrum_rt.cli.options import UsageError, engine_config
from ferrum_rt.cli.output import described_model, table
from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import ModelError, Unsupported
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from ferrum_rt.interfaces.types import ModelInfo, TokenId
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.load_job import bytes_per_page
from ferrum_rt.runtime.loading.loader import resolve_model
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.models.families import parse_config

_BASE = KvDtypeKind.BFLOAT16
_OTHERS = (KvDtypeKind.FLOAT16, KvDtypeKind.FP8, KvDtypeKind.INT8)
_TEXT = Path(ferrum_rt.__file__).parent / "runtime" / "scheduling" / "scheduler.py"


class KvReport(msgspec.Struct, frozen=True, kw_only=True):
    """One type: the bytes of a token's keys and values in all layers, and beside the same with bfloat16: those bytes, the
    difference of the logits (root mean square, and the largest one) over their standard deviation, and the share of
    positions at which the same token is the likeliest."""

    dtype: KvDtypeKind
    bytes_per_token: int
    share_of_bfloat16: float
    rms_error: float
    max_error: float
    same_best: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The logits are those of the last ``num_scored`` of a text's ``num_tokens`` tokens."""

    model: ModelInfo
    num_tokens: int
    num_scored: int
    kv_dtypes: list[KvReport]


def bench_kv(arguments: argparse.Namespace) -> int:
    """Print the report. Raises UsageError, ConfigError and what loading a model raises."""
    config = engine_config(arguments)
    tokens = _read_tokens(config, arguments.text or _TEXT, arguments.tokens)
    report = anyio.run(_compare, config, tokens, backend_options={"use_uvloop": True})
    print(msgspec.json.encode(report).decode() if arguments.json else _as_text(report))
    return 0


def _read_tokens(config: EngineConfig, path: Path, count: int) -> list[TokenId]:
    if count < 2:
        raise UsageError(f"argument --tokens: must be at least 2, got {count}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"argument --text: {path}: cannot be read: {error.strerror}") from error
    tokenizer = HfTokenizerFactory().load(resolve_model(config.model.source))
    tokens = tokenizer.encode_batch([text], add_special_tokens=True)[0]
    if len(tokens) < count:
        raise UsageError(f"argument --text: {path} has {len(tokens)} tokens, and --tokens asks for {count}")
    return tokens[:count]


async def _compare(config: EngineConfig, tokens: list[TokenId]) -> Report:
    """Of the type that is configured; of all that this device has, where none is."""
    spec = parse_config(read_json(resolve_model(config.model.source) / "config.json", ModelError))
    num_bytes = {kind: bytes_per_page(config, spec, kind) // config.kv_cache.block_size for kind in KvDtypeKind}
    wanted = config.kv_cache.dtype
    model, exact = await _decode(config, _BASE, tokens)
    reports = [_kv_report(_BASE, num_bytes, exact, exact)]
    for kind in _OTHERS if wanted is None else {wanted} - {_BASE}:
        try:
            _, logits = await _decode(config, kind, tokens)
        except Unsupported:
            if wanted is not None:
                raise
        else:
            reports.append(_kv_report(kind, num_bytes, logits, exact))
    return Report(model=model, num_tokens=len(tokens), num_scored=len(exact), kv_dtypes=reports)


async def _decode(config: EngineConfig, kind: KvDtypeKind, tokens: list[TokenId]) -> tuple[ModelInfo, list[Tensor]]:
    """The logits [vocabulary] of each token of the text's second half. The first is the prompt; so each of those tokens
    reads the pages of all before it."""
    changed = msgspec.structs.replace(config, kv_cache=msgspec.structs.replace(config.kv_cache, dtype=kind))
    half, follower = len(tokens) // 2, _Follower(tokens)
    async with ferrum_rt.open_runtime(config=changed) as engine:
        model = (await engine.status()).model
        assert model is not None
        if len(tokens) > model.max_model_len:
            raise UsageError(f"argument --tokens: this model takes at most {model.max_model_len}, got {len(tokens)}")
        await engine.infer(
            tokens[:half], max_tokens=len(tokens) - half, temperature=0.0, ignore_eos=True, logits_processors=[follower]
        )
    return model, follower.logits


class _Follower:
    """A LogitsProcessor that keeps the logits, and lets the next token be the text's."""

    def __init__(self, tokens: list[TokenId]) -> None:
        self._tokens = tokens
        self.logits: list[Tensor] = []

    def apply(self, token_ids: list[TokenId], logits: Tensor) -> Tensor:
        self.logits.append(logits.to("cpu", copy=True))
        chosen = torch.full_like(logits, -torch.inf)
        chosen[self._tokens[len(token_ids)]] = 0.0
        return chosen


def _kv_report(
    kind: KvDtypeKind, num_bytes: Mapping[KvDtypeKind, int], found: Sequence[Tensor], exact: Sequence[Tensor]
) -> KvReport:
    pairs = list(zip(found, exact, strict=True))
    count = len(pairs)
    spread = (sum(float(logits.var(correction=0)) for logits in exact) / count) ** 0.5
    square = sum(float((ours - theirs).square().mean()) for ours, theirs in pairs) / count
    return KvReport(
        dtype=kind,
        bytes_per_token=num_bytes[kind],
        share_of_bfloat16=num_bytes[kind] / num_bytes[_BASE],
        rms_error=square**0.5 / spread,
        max_error=max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / spread,
        same_best=sum(int(ours.argmax() == theirs.argmax()) for ours, theirs in pairs) / count,
    )


def _as_text(report: Report) -> str:
    where = f"of the last {report.num_scored} of {report.num_tokens} tokens beside those with {_BASE.value}"
    header = ["KV dtype", "bytes/token", "of bfloat16", "RMS error", "largest error", "same best token"]
    rows = [
        [
            kv.dtype.value,
            str(kv.bytes_per_token),
            f"{kv.share_of_bfloat16:.1%}",
            f"{kv.rms_error:.3%}",
            f"{kv.max_error:.2%}",
            f"{kv.same_best:.1%}",
        ]
        for kv in report.kv_dtypes
    ]
    return (
        f"{described_model(report.model)}: logits {where};\n"
        f"errors are shares of the logits' standard deviation\n\n{table(header, rows)}"
    )
