"""The runtime's promises on a real model: the demo model, on the CPU."""

import asyncio
import logging
import os
import random
import signal
import sys
import threading
import time

import anyio
import pytest
import torch

from ferrum_rt import FinishReason, InferenceRequest, InferenceResponse, RequestId, SessionId
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.model_executor import PageSwap, SlotAssignment, StepInput, StepOutput, UnifiedBatch
from ferrum_rt.interfaces.requests import RequestFields
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchPlan, SequenceUpdate
from ferrum_rt.runtime.execution.executor import DecoderExecutor
from ferrum_rt.runtime.execution.step_rows import parts_of
from ferrum_rt.runtime.loading.loader import load_model
from ferrum_rt.runtime.runtime import Runtime, open_runtime

PROMPTS = ["def ", "import ", "class ", "    for i in range(", "# The ", "try:\n    ", "return ", '"""Return ']


def watch_pages(engine: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[RequestId]:
    """Check the ledger after each step, and that no request of the returned list still holds pages."""
    cancelled: list[RequestId] = []
    commit = engine._scheduler.commit

    def checked(plan: BatchPlan, output: StepOutput, step_s: float) -> list[SequenceUpdate]:
        updates = commit(plan, output, step_s)
        engine._cache.verify()
        assert not set(cancelled) & {handle.request_id for handle in engine._cache._handles}
        return updates

    monkeypatch.setattr(engine._scheduler, "commit", checked)
    return cancelled


@pytest.mark.slow
async def test_64_streams_of_which_a_third_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 64 streams ends exactly once, the page ledger is exact after each step, and a cancelled one holds no page
    in any step after."""
    rng = random.Random(0)
    ends: dict[RequestId, list[FinishReason]] = {}
    async with open_runtime(kv_cache={"num_pages": 300}, max_model_len=512) as engine:
        cancelled = watch_pages(engine, monkeypatch)

        async def read(index: int) -> None:
            request_id = RequestId(str(index))
            ends[request_id] = []
            leave_at = rng.randrange(40) if index % 3 == 0 else None
            prompt = PROMPTS[index % len(PROMPTS)] * rng.randint(1, 12)
            async with engine.infer_stream(
                prompt, id=request_id, max_tokens=rng.randint(1, 80), seed=index, ignore_eos=index % 2 == 0
            ) as chunks:
                count = 0
                async for chunk in chunks:
                    count += 1
                    if chunk.finish_reason is not None:
                        ends[request_id].append(chunk.finish_reason)
                    elif leave_at is not None and count > leave_at:
                        break
            if not ends[request_id]:
                ends[request_id].append(FinishReason.CANCELLED)
                cancelled.append(request_id)

        async with anyio.create_task_group() as tasks:
            for index in range(64):
                tasks.start_soon(read, index)
        status = await engine.status()
        assert status.pages.active == 0
    assert {len(reasons) for reasons in ends.values()} == {1}
    assert status.requests.cancelled == len(cancelled) > 5
    assert status.requests.finished == 64 - len(cancelled)
    assert status.requests.failed == 0


@pytest.mark.slow
async def test_a_seed_fixes_the_output_whatever_else_runs() -> None:
    """At temperature 1 in float32 a seeded request gets the same tokens alone and among seven others."""

    def fields(seed: int) -> RequestFields:
        return {"seed": seed, "temperature": 1.0, "max_tokens": 30, "ignore_eos": True}

    async with open_runtime(dtype="float32") as engine:
        alone = await engine.infer("def ", **fields(7))
        results: dict[int, InferenceResponse] = {}

        async def run(seed: int) -> None:
            results[seed] = await engine.infer("def ", **fields(seed))

        async with anyio.create_task_group() as tasks:
            for seed in range(8):
                tasks.start_soon(run, seed)
        assert results[7].token_ids == alone.token_ids
        assert len({tuple(result.token_ids) for result in results.values()}) > 4


class LoopWatch:
    """The longest time a single callback has kept the event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.longest = 0.0
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.perf_counter()
            run(handle)
            self.longest = max(self.longest, time.perf_counter() - began)

        monkeypatch.setattr(asyncio.Handle, "_run", timed)


@pytest.mark.slow
async def test_the_event_loop_is_never_blocked_for_5_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    """While 32 requests generate and a text of 60,000 characters is tokenized, no callback keeps the loop for 5 ms. On a
    machine that others use too a callback can lose its processor: what blocks of itself does so in each of five tries."""
    async with open_runtime() as engine:
        await engine.infer("def ", max_tokens=4)
        watch = LoopWatch(monkeypatch)
        tries = []
        for _ in range(5):
            watch.longest = 0.0
            async with anyio.create_task_group() as tasks:
                for index in range(32):
                    prompt = PROMPTS[index % len(PROMPTS)]
                    tasks.start_soon(lambda prompt: engine.infer(prompt, max_tokens=24, ignore_eos=True), prompt)
                # Too long for the model, which is found out only once it is tokenized.
                tasks.start_soon(lambda: engine.infer_batch(["x = 'a word'\n" * 5_000]))
            tries.append(watch.longest)
            if tries[-1] < 0.005:
                return
    pytest.fail(f"the longest callbacks took {[f'{1000 * longest:.1f} ms' for longest in tries]}")


def host_state() -> tuple[object, ...]:
    """What belongs to the host process and not to a library in it."""
    return (
        {number: signal.getsignal(number) for number in signal.valid_signals()},
        dict(os.environ),
        list(logging.getLogger().handlers),
        logging.getLogger().level,
        sys.getswitchinterval(),
        threading.stack_size(),
        sys.excepthook,
        threading.excepthook,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.random.get_rng_state().tolist(),
        set(threading.enumerate()),
    )


@pytest.mark.slow
def test_the_host_process_is_left_alone() -> None:
    """No signal handler, logging set-up, environment variable, torch setting, random state or thread is changed."""

    async def main() -> None:
        async with open_runtime() as engine:
            await engine.infer("def ", max_tokens=4, temperature=1.0)

    before = host_state()
    anyio.run(main)
    assert host_state() == before


@pytest.mark.slow
async def test_a_chat_in_a_session_computes_only_what_is_new() -> None:
    """Three turns over pages without a prefix cache: each computes the tokens since the last one's end and no others, and
    has the text that it has without a session. (In bfloat16 keys differ with whether a token was decoded or prefilled.)"""
    async with open_runtime(dtype="float32", kv_cache={"prefix_caching": False}, max_model_len=512) as engine:
        prompt = list(range(40, 70))
        for turn in range(3):
            given: RequestFields = {"max_tokens": 21, "temperature": 1.0, "seed": turn, "ignore_eos": True}
            alone = await engine.infer(prompt, **given)
            given["session_id"] = SessionId("chat")
            said = await engine.infer(prompt, **given)
            assert said.text == alone.text
            assert alone.usage.cached_tokens == 0
            assert said.usage.cached_tokens == (len(prompt) - 6 if turn else 0)  # all but its last token and the five new
            prompt = [*prompt, *said.token_ids, *range(50, 55)]


@pytest.mark.slow
async def test_preempted_requests_come_back_from_the_host() -> None:
    """Requests that do not all fit, forced to swap whenever one is preempted, have the text that each has alone."""
    config = {"prefix_caching": False, "num_pages": 12}
    prompts = [list(range(40 + index, 60 + index)) for index in range(4)]
    given: RequestFields = {"max_tokens": 100, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    async with open_runtime(
        dtype="float32", kv_cache=config, memory={"swap_bytes": 2**24}, max_model_len=160, scheduler={"itl_target_s": 10}
    ) as engine:
        alone = [(await engine.infer(prompt, **given)).text for prompt in prompts]
        swapping = engine._scheduler.swapping
        swapping.bytes_per_s = 1e15
        found = await engine.infer_batch(prompts, **given)
        assert [item.text for item in found if isinstance(item, InferenceResponse)] == alone
        assert swapping.num_out > 0
        assert swapping.num_in == swapping.num_out
        swapping.verify()


@pytest.mark.slow
async def test_a_session_comes_back_from_the_host() -> None:
    """A chat whose pages others take between its turns, forced to swap, has the tokens that it has without a session, and
    computes nothing again."""
    config = {"prefix_caching": False, "num_pages": 12}
    given: RequestFields = {"max_tokens": 30, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    async with open_runtime(dtype="float32", kv_cache=config, memory={"swap_bytes": 2**24}, max_model_len=160) as engine:
        swapping = engine._scheduler.swapping
        prompt = list(range(40, 53))
        for turn in range(3):
            alone = await engine.infer(prompt, **given)
            swapping.bytes_per_s = 1e15
            said = await engine.infer(InferenceRequest(prompt=prompt, session_id=SessionId("chat")), **given)
            assert said.token_ids == alone.token_ids
            assert said.usage.cached_tokens == (len(prompt) - 6 if turn else 0)  # all but its last token and the five new
            prompt = [*prompt, *said.token_ids, *range(50, 55)]
            num_out = swapping.num_out
            await engine.infer(list(range(60, 200)), max_tokens=15)
            assert swapping.num_out > num_out
        assert swapping.num_in > 0
        swapping.verify()


@pytest.mark.slow
def test_what_goes_out_is_on_the_host_though_the_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that the sampler breaks has swapped out all the same: the scheduler counts on it."""
    executor = load_model(build_config(None, None, {"dtype": "float32", "memory": {"swap_bytes": 2**20}})).executor
    assert isinstance(executor, DecoderExecutor)
    with torch.inference_mode():
        for part in parts_of(executor._cache):
            part[: executor._block_size] = 7.0
    monkeypatch.delattr(type(executor._sampler), "assign")
    assigned = SlotAssignment(0, RequestId("r"), SamplingConfig(), [1])

    with pytest.raises(AttributeError, match="assign"):
        executor.execute(StepInput([assigned], [], [], UnifiedBatch([], []), swapped_out=[PageSwap(0, 2)]))

    for host in executor._host_pages:
        assert bool((host[2 * executor._block_size : 3 * executor._block_size] == 7.0).all())
    executor.close()
