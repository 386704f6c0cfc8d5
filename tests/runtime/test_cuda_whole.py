"""The real CudaOps under the real CudaExecutor in the real Runtime: FlashInfer and the GPU alone are emulated."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

from ferrum_rt import InferenceResponse
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.reference import ReferenceOps
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.loader import DEMO_MODEL, load_model
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.models.decoder import load_weights
from ferrum_rt.runtime.models.families import parse_config
from ferrum_rt.runtime.models.weights import DummyReader
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes import flashinfer as emulation
from tests.fakes.device import EmulatedDevice
from tests.fakes.queued_flashinfer import queued_backend
from tests.runtime.models.test_cuda_decoder import BLOCK_SIZE, PROMPTS, Loop

NUM_TOKENS = 24


@pytest.fixture(autouse=True)
def _small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroing the real one takes longer than a test."""
    monkeypatch.setattr("ferrum_rt.kernels.cuda.ops.WORKSPACE_BYTES", 2**20)


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice()
    yield made
    made.close()


@asynccontextmanager
async def engine_on(device: EmulatedDevice, **fields: Any) -> AsyncIterator[Runtime]:
    config = build_config(None, None, {"dtype": "float16", "max_model_len": 96, **fields})
    async with Runtime(config, partial(load_model, find_cuda=lambda kind: queued_backend(device))) as engine:
        yield engine


def prompts() -> list[list[int]]:
    tokenizer = HfTokenizerFactory(()).load(DEMO_MODEL)
    return [list[int](ids) for ids in tokenizer.encode_batch(PROMPTS, add_special_tokens=False)]


def alone() -> list[list[int]]:
    """What CudaOps says with no executor over it."""
    ops = CudaOps("cpu", block_size=BLOCK_SIZE, kv_dtype=torch.float16, dtype=torch.float16, flashinfer=emulation)
    with torch.inference_mode():
        return Loop(ops, torch.float16, torch.float16).generate(prompts(), NUM_TOKENS)


async def generate(engine: Runtime, requests: list[dict[str, Any]]) -> list[InferenceResponse]:
    """All at once, each from the prompt of its number."""
    found: dict[int, InferenceResponse] = {}
    ids = prompts()

    async def run(index: int) -> None:
        fields = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True, **requests[index]}
        found[index] = await engine.infer(ids[index % len(ids)], **fields)

    async with anyio.create_task_group() as tasks:
        for index in range(len(requests)):
            tasks.start_soon(run, index)
    return [found[index] for index in range(len(requests))]


@pytest.mark.slow
async def test_tokens_are_those_of_the_ops_alone(device: EmulatedDevice) -> None:
    """Prompts in chunks of a few tokens, four sizes of graphs and one of pieces, ``n`` of two and a row that the graph
    cannot draw, all at once: greedy tokens are those of CudaOps without an executor. Only greedy draws are made."""
    lengths = [{"max_tokens": NUM_TOKENS - 3 * index} for index in range(3)]
    async with engine_on(device, scheduler={"max_running_requests": 5}, batching={"max_batched_tokens": 8}) as engine:
        found = await generate(engine, [*lengths, {"n": 2}, {"logprobs": 1}])
        num_layers = engine.model_info.num_layers
    expected = alone()
    for index in range(3):
        assert list(found[index].token_ids) == expected[index][: NUM_TOKENS - 3 * index]
    assert [list(output.token_ids) for output in found[3].outputs or ()] == [expected[0]] * 2
    assert list(found[4].token_ids) == expected[1]
    pieces, decodes = device.graphs[: num_layers + 1], device.graphs[num_layers + 1 :]
    assert all(graph.num_replays for graph in pieces)
    assert len(decodes) == 4 * 4  # a forward and three draws
    assert all(graph.num_replays for graph in (*decodes[::4], *decodes[1::4])), "a batch size was never put to the test"
    assert not any(graph.num_replays for graph in (*decodes[2::4], *decodes[3::4]))


@pytest.mark.slow
async def test_preemption_changes_no_token(device: EmulatedDevice) -> None:
    """With too few pages for all, sequences are computed again and end in the same tokens."""
    async with engine_on(
        device,
        scheduler={"max_running_requests": 4},
        batching={"max_batched_tokens": 8},
        kv_cache={"num_pages": 14, "block_size": 4, "prefix_caching": False},
        max_model_len=48,
    ) as engine:
        found = await generate(engine, [{}] * 6)
        assert engine.metrics().scheduler.preemptions > 0
    expected = alone()
    assert [list(response.token_ids) for response in found] == expected + expected


@pytest.mark.slow
async def test_seeded_draws_do_not_depend_on_the_batch(device: EmulatedDevice) -> None:
    """Rows with temperature, top_k, top_p and min_p are drawn as when they are alone."""
    requests = [
        {"temperature": 1.0, "top_p": 1.0, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 2},
        {"temperature": 1.2, "min_p": 0.02, "top_p": 1.0, "seed": 3},
    ]
    async with engine_on(device, scheduler={"max_running_requests": 3}) as engine:
        together = await generate(engine, requests)
        for index, response in enumerate(together):
            neutral = [{"max_tokens": 1}] * index
            assert (await generate(engine, [*neutral, requests[index]]))[-1].token_ids == response.token_ids
        assert together[0].token_ids != (await generate(engine, [{}]))[0].token_ids


@pytest.mark.parametrize("has_moe", [False, True], ids=["dense", "experts"])
def test_all_of_a_model_lies_where_its_reader_puts_it(has_moe: bool) -> None:
    """No table, norm or weight stays on the host: a kernel would read its address there."""
    raw = dict(read_json(DEMO_MODEL / "config.json", ModelError))
    if has_moe:
        raw |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        }
    spec = parse_config(raw)
    ops = ReferenceOps("meta")
    weights = load_weights(spec, DummyReader(0.0, "meta"), ops, torch.float16, 64, lambda done, total: None)
    tensors = list(_tensors(weights))
    assert len(tensors) > 6 * len(spec.layers)
    assert {x.device.type for x in tensors} == {"meta"}


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for item in x:
            yield from _tensors(item)
    elif hasattr(x, "__slots__") and not isinstance(x, str | int | float):
        for name in x.__slots__:
            yield from _tensors(getattr(x, name))
