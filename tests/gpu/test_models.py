"""Whole models on a real GPU: the Runtime, the CUDA executor, FlashInfer; against the reference on the CPU."""

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

import ferrum_rt
from ferrum_rt.interfaces.errors import DeadlineExceeded, ModelError
from ferrum_rt.interfaces.types import Device
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.reference import ReferenceOps
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.loader import DEMO_MODEL
from ferrum_rt.runtime.models.decoder import Decoder, load_weights
from ferrum_rt.runtime.models.families import parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader
from tests.checkpoints import FAMILIES, VOCAB_SIZE, save_checkpoint, save_tokenizer

PROMPTS = ["def mean(values):\n    return ", "import ", "class A:\n    def ", "for i in range("]
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 32}
# Head dims that the kernels have, where the family's own is smaller; experts run in bfloat16 alone.
SIZES: dict[str, Any] = {"head_dim": 64, "intermediate_size": 128}
MORE: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 256},
    "qwen2": {"hidden_size": 256},
    "qwen3_moe": {"moe_intermediate_size": 64},
}


async def generate(prompts: list[Any], model: Path | None = None, fields: Any = None, **config: Any) -> list[list[int]]:
    """All at once: the tokens of each."""
    async with ferrum_rt.open_runtime(model, **config) as engine:
        results = await engine.infer_batch(prompts, **{**GREEDY, **(fields or {})})
    found = []
    for result in results:
        if isinstance(result, ferrum_rt.FerrumError):
            raise result
        found.append(list[int](result.token_ids))
    return found


def gaps(model: Path, dtype: torch.dtype, prompt: list[int], output: list[int]) -> list[float]:
    """How far below the reference's best each of the output's tokens is, in units of the largest logit. The reference
    has weights of ``dtype`` and computes in float32."""
    spec = parse_config(read_json(model / "config.json", ModelError))
    tokens, ops = prompt + output, ReferenceOps()
    count = len(tokens) - 1
    with torch.inference_mode():
        weights = load_weights(spec, _Rounded(CheckpointReader(model), dtype), ops, torch.float32, 512, lambda *_: None)
        decoder = Decoder(spec, weights, ops, torch.float32, count, count)
        cache = [allocate_pages(count, spec.num_kv_heads, spec.head_dim, torch.float32, "cpu") for _ in spec.layers]
        at = torch.arange(count)
        table = torch.arange(count)[None]
        batch = TokenBatch(torch.tensor(tokens[:-1]), at, at, at, [QuerySpan(0, 0, count, 0)], table, 1)
        logits = decoder.logits(decoder.forward(batch, decoder.plan_attention(batch), cache), at)[len(prompt) - 1 :]
    said = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    found: list[float] = ((logits.amax(-1) - said) / logits.abs().amax(-1)).tolist()
    return found


class _Rounded:
    """Weights as the GPU has them."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype) -> None:
        self._reader, self._dtype = reader, dtype
        self.check, self.read_scale = reader.check, reader.read_scale

    def read(self, part: Any, dtype: torch.dtype) -> Tensor:
        name = part.names[0]
        is_norm = name.endswith("norm.weight")
        return self._reader.read(part, torch.float32 if is_norm else self._dtype).to(dtype)


async def test_the_demo_model_says_what_it_says_on_the_cpu() -> None:
    """Greedy tokens in float16, in prefills, chunks and replayed decodes of several batch sizes, are the CPU's in float32 or
    as good as them."""
    config: dict[str, Any] = {"max_model_len": 256, "scheduler": {"max_running_requests": 5}}
    expected = await generate(PROMPTS, device="cpu", dtype="float32", **config)
    for max_tokens in (512, 8):
        batching: dict[str, Any] = {"batching": {"max_batched_tokens": max_tokens}}
        found = await generate(PROMPTS, device="cuda", dtype="float16", **config, **batching)
        same = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
        assert same >= len(PROMPTS) - 1, f"{found} != {expected}"


@pytest.mark.parametrize("kind", FAMILIES)
async def test_each_family(kind: str, tmp_path: Path) -> None:
    """Every token of a tiny checkpoint is one that the reference finds as good as its own, within the type's rounding; which
    may choose another expert now and then, where there are some."""
    model = save_checkpoint(kind, save_tokenizer(tmp_path), **{**SIZES, **MORE.get(kind, {})})
    rng = random.Random(kind)
    prompts = [[rng.randrange(5, VOCAB_SIZE) for _ in range(length)] for length in (3, 40, 90)]
    found = await generate(
        prompts, model, device="cuda", dtype="bfloat16", max_model_len=256, scheduler={"max_running_requests": 4}
    )
    for prompt, output in zip(prompts, found, strict=True):
        assert len(output) == GREEDY["max_tokens"]
        worse = [gap for gap in gaps(model, torch.bfloat16, prompt, output) if gap > 16 * torch.finfo(torch.bfloat16).eps]
        assert len(worse) <= (3 if kind in ("mixtral", "qwen3_moe") else 0)


async def test_a_type_of_eight_bits_for_the_pages() -> None:
    """The demo model over fp8 pages writes what it writes over others, for a few tokens at least."""
    config: dict[str, Any] = {"device": "cuda", "dtype": "float16", "max_model_len": 256}
    wide = await generate(PROMPTS, fields={"max_tokens": 4}, **config)
    narrow = await generate(PROMPTS, fields={"max_tokens": 4}, kv_dtype="fp8", **config)
    assert sum(ours == theirs for ours, theirs in zip(narrow, wide, strict=True)) >= len(PROMPTS) // 2


async def test_random_schedules() -> None:
    """Requests of any kind that come, are cancelled and preempted at random: who has an end has the length that was asked
    for, NaN and foreign pages show in nobody's tokens, and no page is left active."""
    rng = random.Random(7)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.0, "n": 2},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.8, "repetition_penalty": 1.2},
    ]
    async with ferrum_rt.open_runtime(
        device="cuda",
        dtype="float16",
        max_model_len=160,
        scheduler={"max_running_requests": 9},
        batching={"max_batched_tokens": 24},
        kv_cache={"num_pages": 20},
    ) as engine:
        expected = {
            prompt: (await engine.infer(prompt, **GREEDY)).token_ids for prompt in PROMPTS
        }  # each alone, as nobody else is there yet
        wrong: list[str] = []

        async def run(index: int) -> None:
            prompt, fields = rng.choice(PROMPTS), kinds[index % len(kinds)]
            await anyio.sleep(rng.random())
            # The scope's deadline is the request's too: which of them is noticed first is luck.
            with suppress(DeadlineExceeded), anyio.move_on_after(rng.random() if index % 4 == 3 else None):
                response = await engine.infer(prompt, **{**GREEDY, "seed": index, **fields})
                outputs = [list(output.token_ids) for output in response.outputs or ()] or [list(response.token_ids)]
                wrong.extend(f"{index}: {output}" for output in outputs if len(output) != GREEDY["max_tokens"])
                # Batches of other sizes round otherwise: the beginning is the same all the same.
                if fields == kinds[0] and outputs[0][:4] != list(expected[prompt])[:4]:
                    wrong.append(f"{index}: {outputs[0]}")

        async with anyio.create_task_group() as tasks:
            for index in range(80):
                tasks.start_soon(run, index)
        assert wrong == []
        status = await engine.status()
        assert status.model is not None
        assert status.model.device is Device.CUDA
        assert status.pages.active == 0
        assert engine.metrics().scheduler.preemptions > 0


async def test_seeded_output_does_not_depend_on_the_batch() -> None:
    """The first tokens of a seeded request are the same alone and among others."""
    fields = {"temperature": 1.0, "top_p": 1.0, "seed": 3, "max_tokens": 6}
    config: dict[str, Any] = {"device": "cuda", "dtype": "float16", "max_model_len": 128}
    (alone,) = await generate(PROMPTS[:1], fields=fields, **config)
    among = await generate(PROMPTS * 3, fields=fields, **config)
    assert among[0] == alone


def test_demo_model_is_there() -> None:
    """The tests above need no download."""
    assert (DEMO_MODEL / "model.safetensors").is_file()
