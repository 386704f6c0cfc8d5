"""The whole runtime with the CUDA executor: on an emulated device, with the demo model."""

import threading
from typing import Any

import anyio
import pytest
import torch

import ferrum_rt
from ferrum_rt import EngineFailed, InferenceResponse
from ferrum_rt.interfaces.types import Device
from ferrum_rt.runtime.execution.cuda_executor import CudaExecutor
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.device import EmulatedDevice, EmulatedGraph
from tests.runtime.cuda_engines import emulated_engine

pytestmark = pytest.mark.slow

PROMPTS = ["def mean(values):\n    return ", "import ", "class A:\n    def ", "for i in range("]
# Rows that the graph draws as the CPU's sampler does, and rows that the sampler draws on both.
SAME_AS_ON_THE_CPU: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 1.0},  # the model's own default is 0.95
    {"temperature": 0.0, "n": 1, "logprobs": 3},
    {"temperature": 0.9, "repetition_penalty": 1.3},
    {"temperature": 1.0, "bad_words": ["self", "return"]},
    {"temperature": 1.0, "typical_p": 0.8},
    {"temperature": 1.0, "mirostat": {"tau": 3.0}},
    {"temperature": 1.0, "logit_bias": {10: 5.0, 11: -5.0}},
    {"temperature": 1.0, "response_format": {"type": "regex", "definition": "[a-z_ ]{12}"}},
    {"temperature": 1.0, "top_p": 1.0, "n": 3, "prompt_logprobs": 2},
]
DRAWN_OTHERWISE: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.02, "n": 2},
]


async def generate(engine: Runtime, requests: list[dict[str, Any]], max_tokens: int = 16) -> list[Any]:
    """All at once, each with its number as its seed: for each its outputs' tokens and scores."""
    found: list[Any] = [None] * len(requests)

    async def run(index: int) -> None:
        prompt = PROMPTS[index % len(PROMPTS)]
        response = await engine.infer(prompt, max_tokens=max_tokens, seed=index, **requests[index])
        found[index] = [list(output.token_ids) for output in response.outputs or ()] or [list(response.token_ids)]

    async with anyio.create_task_group() as tasks:
        for index in range(len(requests)):
            tasks.start_soon(run, index)
    return found


async def on_the_cpu(requests: list[dict[str, Any]], max_tokens: int = 16) -> list[Any]:
    async with ferrum_rt.open_runtime(dtype="float32", max_model_len=96, device="cpu") as engine:
        return await generate(engine, requests, max_tokens)


async def test_outputs_equal_those_on_the_cpu() -> None:
    """Greedy and seeded requests of every kind, all at once, get the tokens that the CPU's executor gives them."""
    async with emulated_engine(scheduler={"max_running_requests": 9}) as engine:
        assert engine.model_info.device is Device.CUDA
        found = await generate(engine, SAME_AS_ON_THE_CPU)
    assert found == await on_the_cpu(SAME_AS_ON_THE_CPU)


async def test_outputs_do_not_depend_on_chunks_and_preemption() -> None:
    """With prompts in chunks of a few tokens and too few pages, so that sequences are preempted, everybody's seeded tokens
    are those of a roomy engine."""
    requests = SAME_AS_ON_THE_CPU[:2] * 3 + DRAWN_OTHERWISE
    async with emulated_engine(scheduler={"max_running_requests": 9}) as engine:
        expected = await generate(engine, requests)
    async with emulated_engine(
        scheduler={"max_running_requests": 5},
        batching={"max_batched_tokens": 6},
        kv_cache={"num_pages": 16, "block_size": 4, "prefix_caching": False},
        max_model_len=40,
    ) as engine:
        found = await generate(engine, requests)
        assert engine.metrics().scheduler.preemptions > 0
    assert found == expected


async def test_decodes_are_graphs_and_wait_for_nothing() -> None:
    """While plain requests decode, every step is a replay of the model's graph and of one draw, and the executor's thread
    waits for no result."""
    device = EmulatedDevice()
    async with emulated_engine(device, scheduler={"max_running_requests": 2}) as engine:
        executor = engine._model.executor
        assert isinstance(executor, CudaExecutor)
        syncs = device.num_syncs
        response = await engine.infer("def ", max_tokens=20, temperature=1.0, ignore_eos=True)
        assert len(response.token_ids) == 20
        decodes = [graph for graphs in executor._graphs.values() for graph in (graphs.forward, *graphs.draws)]
        assert sum(graph.num_replays for graph in decodes if isinstance(graph, EmulatedGraph)) == 2 * 19
        assert device.num_syncs == syncs


async def test_a_fault_of_the_device_ends_the_engine() -> None:
    """Everybody under way gets EngineFailed, so do those who come later, and health says so; closing leaves no thread."""
    device = EmulatedDevice()
    async with emulated_engine(device, scheduler={"max_running_requests": 2}) as engine:
        failures: list[EngineFailed] = []

        async def run() -> None:
            try:
                async with engine.infer_stream("def ", max_tokens=60, temperature=0.0, ignore_eos=True) as chunks:
                    async for _ in chunks:
                        device.die_at = 50
            except EngineFailed as error:
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            tasks.start_soon(run)
        assert ["illegal memory access" in str(error) for error in failures] == [True, True]
        with pytest.raises(EngineFailed):
            await engine.infer("def ")
        assert not (await engine.health_check()).healthy
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ferrum")]


async def test_memory_that_runs_out_once_is_not_seen() -> None:
    """A step that found no memory is run again, and nobody hears of it; one that finds none twice fails its own requests."""
    device = EmulatedDevice()
    async with emulated_engine(device, scheduler={"max_running_requests": 2}) as engine:
        expected = await engine.infer("def ", max_tokens=4, temperature=0.0)
        device.fail_at = 20
        assert (await engine.infer("def ", max_tokens=4, temperature=0.0)).token_ids == expected.token_ids
        assert device.fail_at is None
        device.fail_at, device.num_failures = 20, 2
        with pytest.raises(ferrum_rt.ResourceExhausted, match="the GPU has no memory"):
            await engine.infer("def ", max_tokens=4, temperature=0.0)
        response = await engine.infer("def ", max_tokens=4, temperature=0.0)
        assert isinstance(response, InferenceResponse)
        assert response.token_ids == expected.token_ids


async def test_cancelled_streams_free_their_pages() -> None:
    """Of 12 streams at once, half of them left early, no page is left active, and the others have their tokens."""
    async with emulated_engine(scheduler={"max_running_requests": 5}) as engine:
        whole: list[list[int]] = []

        async def read(index: int) -> None:
            tokens: list[int] = []
            async with engine.infer_stream("import ", max_tokens=12, temperature=0.0, ignore_eos=True) as chunks:
                async for chunk in chunks:
                    tokens.extend(chunk.token_ids)
                    if index % 2 and len(tokens) > index:
                        return
            whole.append(tokens)

        async with anyio.create_task_group() as tasks:
            for index in range(12):
                tasks.start_soon(read, index)
        assert (await engine.status()).pages.active == 0
        assert len(whole) == 6 or len(whole) == 7  # the one that would leave after 12 tokens has them all
        assert len({tuple(tokens) for tokens in whole}) == 1


def test_the_cpu_needs_no_gpu() -> None:
    """On this machine, wherever it is, the tests above ran without one."""
    assert not torch.cuda.is_initialized()
