"""A checkpoint's scales for keys and values in fp8."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.reference import ReferenceOps
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.loader import load_model
from ferrum_rt.runtime.models.decoder import Decoder, load_weights
from ferrum_rt.runtime.models.families import parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader
from tests.checkpoints import FAMILIES, save_checkpoint, save_tokenizer

FP8 = torch.float8_e4m3fn
TOKENS = list(range(5, 45))


def logits_of(directory: Path, *, kv_dtype: torch.dtype, has_fp8_pages: bool) -> Tensor:
    """Of TOKENS [N, vocabulary], in float32 but for the pages."""
    spec, ops = parse_config(read_json(directory / "config.json", ModelError)), ReferenceOps()
    load = partial(load_weights, spec, CheckpointReader(directory), ops, torch.float32, 64, lambda *_: None)
    rows, count = torch.arange(len(TOKENS)), len(TOKENS)
    spans, tables = [QuerySpan(0, 0, count, 0)], torch.arange(4)[None]
    batch = TokenBatch(torch.tensor(TOKENS), rows, rows, rows, spans, tables, 16)
    with torch.inference_mode():
        decoder = Decoder(spec, load(has_fp8_pages=has_fp8_pages), ops, torch.float32, count, count)
        cache = [allocate_pages(64, spec.num_kv_heads, spec.head_dim, kv_dtype, "cpu") for _ in spec.layers]
        hidden = decoder.forward(batch, decoder.plan_attention(batch), cache)
        return decoder.logits(hidden, rows).clone()


def change(directory: Path, factors: Mapping[str, float], added: Mapping[str, Tensor]) -> None:
    """Multiply the tensors whose names have these parts, and add others."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for part, factor in factors.items():
            if part in name:
                tensor *= factor
    save_file(tensors | {name: tensor.clone() for name, tensor in added.items()}, path)


def scales(keys: float, values: float, names: str = "self_attn.{}_scale", num_layers: int = 8) -> dict[str, Tensor]:
    found = {"k": keys, "v": values}
    return {
        f"model.layers.{layer}.{names.format(*[which] * names.count('{}'))}": torch.tensor(value)
        for layer in range(num_layers)
        for which, value in found.items()
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_scales_change_no_digit(kind: str, tmp_path: Path) -> None:
    """In pages that need no scales the logits are the same to the bit with them, in every family."""
    directory = save_checkpoint(kind, tmp_path)
    expected = logits_of(directory, kv_dtype=torch.float32, has_fp8_pages=False)
    change(directory, {}, scales(0.013, 0.3))
    assert torch.equal(logits_of(directory, kv_dtype=torch.float32, has_fp8_pages=True), expected)


@pytest.mark.parametrize("names", ["self_attn.{}_scale", "self_attn.{}_proj.{}_scale", "self_attn.attn.{}_scale"])
def test_scales_bring_small_values_into_range(names: str, tmp_path: Path) -> None:
    """Values too small for fp8 are as good as others, if the checkpoint has their scale, by whichever of its names."""
    directory = save_checkpoint("llama", tmp_path)
    expected = logits_of(directory, kv_dtype=FP8, has_fp8_pages=True)
    change(directory, {"v_proj": 2.0**-14, "o_proj": 2.0**14}, {})
    assert not torch.allclose(logits_of(directory, kv_dtype=FP8, has_fp8_pages=True), expected, atol=0.05)
    change(directory, {}, scales(1.0, 1.1 * 2.0**-14, names))
    assert torch.equal(logits_of(directory, kv_dtype=FP8, has_fp8_pages=True), expected)


def test_scales_are_used_for_fp8_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine asks for scales if its pages hold fp8."""
    directory = save_checkpoint("llama", save_tokenizer(tmp_path))
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(CheckpointReader, "read_scale", lambda reader, names: asked.append(tuple(names)))
    for kv_dtype, is_asked in (("float32", False), ("fp8", True)):
        load_model(build_config(str(directory), None, {"dtype": "float32", "kv_dtype": kv_dtype})).executor.close()
        assert bool(asked) == is_asked


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, 2.0]), torch.tensor(-1.0), torch.tensor(math.nan), torch.zeros(1)], ids=str
)
def test_what_is_no_scale_is_refused(value: Tensor, tmp_path: Path) -> None:
    """One positive number is a scale; anything else is an error that names it."""
    directory = save_checkpoint("llama", tmp_path)
    change(directory, {}, {"model.layers.0.self_attn.k_scale": value})
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.self_attn\.k_scale' is no scale"):
        logits_of(directory, kv_dtype=FP8, has_fp8_pages=True)
