"""The whole engine in dtype int8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ferrum_rt
from ferrum_rt import InferenceResponse
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.interfaces.types import DataType, TokenId
from ferrum_rt.kernels.int8 import Int8Linear
from ferrum_rt.kernels.reference import Linear, ReferenceOps
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.loader import DEMO_MODEL, load_model
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.models.decoder import DenseMlp, Weights, load_weights
from ferrum_rt.runtime.models.families import parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader
from ferrum_rt.runtime.runtime import open_runtime
from tests.checkpoints import FAMILIES, save_checkpoint, save_tokenizer

PROMPT = [TokenId((7 * index) % 300 + 3) for index in range(40)]
# Python, as the demo model was trained on, of about 7,000 tokens.
TEXT = Path(ferrum_rt.__file__).parent / "runtime" / "scheduling" / "scheduler.py"


def weights_in_int8(directory: Path) -> Weights:
    spec = parse_config(read_json(directory / "config.json", ModelError))
    reader = CheckpointReader(directory)
    return load_weights(spec, reader, ReferenceOps(), torch.bfloat16, 64, lambda done, total: None, is_int8=True)


async def scores(texts: list[list[TokenId]], **config: Any) -> Tensor:
    """The log-probability of each token but the first of each text, given those before it."""
    found = []
    async with open_runtime(**config) as engine:
        for text in texts:
            response = await engine.infer(text, max_tokens=1, prompt_logprobs=0)
            found += [item.logprob for item in response.prompt_logprobs or [] if item.logprob is not None]
    assert len(found) == sum(len(text) - 1 for text in texts)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_rounded(kind: str, tmp_path: Path) -> None:
    """Linear layers, experts' among them, and the head, tied or not; the embedding and the router are not."""
    weights = weights_in_int8(save_checkpoint(kind, tmp_path))
    assert isinstance(weights.lm_head, Int8Linear)
    assert weights.embed.dtype == torch.bfloat16
    for layer in weights.layers:
        linears = [layer.qkv, layer.o]
        if isinstance(layer.mlp, DenseMlp):
            linears += [layer.mlp.gate_up, layer.mlp.down]
        else:
            linears += [linear for expert in layer.mlp.experts for linear in expert]
            assert isinstance(layer.mlp.router, Linear)
        assert [type(linear) for linear in linears] == [Int8Linear] * len(linears)


def test_bytes_of_the_weights(tmp_path: Path) -> None:
    """A byte for each number of a linear layer, and a scale for each row; the embedding has two, norms and the rotary table
    four. A tied head is memory of its own."""
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    weights = weights_in_int8(save_checkpoint("qwen3", tmp_path, **sizes))
    shapes = [(8 * 32, 64), (64, 4 * 32), (2 * 96, 64), (64, 96)] * 4 + [(320, 64)]
    linears = sum(rows * (width + 4) for rows, width in shapes)
    norms, table = 4 * (9 * 64 + 4 * 6 * 32), 4 * 64 * 32
    assert weights.num_bytes == linears + 2 * 320 * 64 + norms + table


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
async def test_families_in_int8(kind: str, tmp_path: Path) -> None:
    """Every family says in int8 nearly what it says in bfloat16."""
    save_tokenizer(save_checkpoint(kind, tmp_path))
    exact, rounded = [await scores([PROMPT], model=tmp_path, dtype=dtype) for dtype in ("bfloat16", "int8")]
    assert (rounded - exact).square().mean().sqrt() < 0.2 * exact.std()
    assert not torch.equal(rounded, exact)


@pytest.mark.slow
async def test_the_engine_in_int8() -> None:
    """The demo model answers, says what it runs in, and keeps keys and values in bfloat16 unless told."""
    config: dict[str, Any] = {"max_model_len": 64, "kv_cache": {"num_pages": 8}}
    async with open_runtime(dtype="int8", **config) as engine:
        response = await engine.infer("import ", max_tokens=8, temperature=0.0, ignore_eos=True)
        status = await engine.status()
    assert isinstance(response, InferenceResponse)
    assert len(response.token_ids) == 8
    assert status.model is not None
    assert status.model.dtype is DataType.INT8
    executor = load_model(build_config(None, None, {"dtype": "bfloat16", **config})).executor
    in_bf16 = executor.memory_usage()
    executor.close()
    assert status.memory.kv_cache == in_bf16.kv_cache
    assert status.memory.weights < 0.6 * in_bf16.weights


@pytest.mark.slow
async def test_perplexity_in_int8() -> None:
    """On several thousand tokens of Python the demo model's perplexity in int8 is within 1 % of that in bfloat16."""
    tokenizer = HfTokenizerFactory().load(DEMO_MODEL)
    tokens = tokenizer.encode_batch([TEXT.read_text(encoding="utf-8")], add_special_tokens=False)[0]
    texts = [tokens[at : at + 1000] for at in range(0, 5000, 1000)]
    exact, rounded = [(-(await scores(texts, dtype=dtype)).mean()).exp() for dtype in ("bfloat16", "int8")]
    assert 1 < exact < 100, "a model that knows nothing would prove nothing"
    assert rounded != exact
    assert abs(rounded / exact - 1) < 0.01
