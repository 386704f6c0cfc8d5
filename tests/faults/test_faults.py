"""Faults of what the engine stands on: threads, pages, clocks, the host. docs/architecture.md lists them all."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.interfaces.errors import Cancelled, DeadlineExceeded, EngineFailed
from ferrum_rt.interfaces.kv_cache import AllocationRequest, KvCacheFork, KvCacheHandle
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.types import FinishReason, InferenceResponse
from ferrum_rt.runtime import runtime as runtime_module
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.simulation.digests import expected_tokens
from ferrum_rt.runtime.threads import lag
from tests.fakes.executor import FakeExecutor, fake_model
from tests.runtime.engines import fake_engine, text_after, until

# -- threads --------------------------------------------------------------------------------------------------------------


class Deadly(Future[StepOutput]):
    """Ends the thread that asks to be told when it is done, the second time: what happens is no call's result."""

    num_asked = 0

    def add_done_callback(self, fn: Callable[[Future[StepOutput]], object]) -> None:
        self.num_asked += 1
        if self.num_asked == 2:
            raise SystemExit
        super().add_done_callback(fn)


class DyingExecutor(FakeExecutor):
    """Its thread dies in the third step."""

    def execute(self, step: StepInput) -> Future[StepOutput]:
        output = super().execute(step)
        return Deadly() if self.num_steps == 3 else output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_executor_thread_ends_every_request() -> None:
    """Requests under way end with EngineFailed at once, and so do later ones; health says which thread it was, and the
    host's block goes on to its end."""
    with anyio.fail_after(5):
        async with Runtime(EngineConfig(), lambda config: fake_model(config, DyingExecutor(config))) as engine:
            results = await engine.infer_batch(["x", "y"], max_tokens=50)
            assert [type(result) for result in results] == [EngineFailed, EngineFailed]
            assert "ferrum-executor" in str(results[0])
            await until(lambda: not engine._executor_thread.is_alive)
            assert not (await engine.health_check()).status.components["executor"].healthy
            with pytest.raises(EngineFailed):
                await engine.infer("z")


async def test_tasks_that_somebody_else_cancels_end_every_request() -> None:
    """A host that cancels every task but its own, as some do at their end, gets an error for what it asks from then on, and
    its own block goes on."""
    async with fake_engine(step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", max_tokens=900) as chunks:
            await anext(aiter(chunks))
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            with pytest.raises(Cancelled):
                _ = [chunk async for chunk in chunks]
        with pytest.raises(Cancelled):
            await engine.infer("x")
        assert engine.status_now().pages.active == 0


# -- pages ----------------------------------------------------------------------------------------------------------------


class StingyCache(PagedKvCache):
    """Says no at one call for pages, the one numbered ``refused``, counted over allocate, extend and fork."""

    refused = 0
    num_asked = 0

    def _refuses(self) -> bool:
        self.num_asked += 1
        return self.num_asked == self.refused

    def allocate(self, request: AllocationRequest) -> KvCacheHandle | None:
        return None if self._refuses() else super().allocate(request)

    def extend(self, handle: KvCacheHandle, num_tokens: int) -> bool:
        return not self._refuses() and super().extend(handle, num_tokens)

    def fork(self, handle: KvCacheHandle, num_tokens: int, room: int) -> KvCacheFork | None:
        return None if self._refuses() else super().fork(handle, num_tokens, room)


async def _refused_at(number: int) -> bool:
    """A scenario in which the pool refuses once; False if it was not asked so often."""
    config = {"kv_cache": {"block_size": 4}, "batching": {"max_batched_tokens": 8}, "scheduler": {"max_running_requests": 3}}
    async with fake_engine(config) as (engine, _):
        cache = engine._cache
        assert isinstance(cache, StingyCache)
        cache.refused = number
        results: list[InferenceResponse] = []

        async def ask(prompt: str, samples: int) -> None:
            results.append(await engine.infer(prompt, max_tokens=6, n=samples, seed=1))

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                for prompt, samples in (("a prompt", 1), ("another", 2), ("the third of them", 1)):
                    tasks.start_soon(ask, prompt, samples)
        for response in results:
            text = {8: b"a prompt", 7: b"another", 17: b"the third of them"}[response.usage.prompt_tokens]
            for output in response.outputs:
                assert output.token_ids == expected_tokens(text, 6, sample=output.index)
        assert len(results) == 3
        assert cache.statistics().pages.active == 0
        cache.verify()
        return cache.num_asked >= number


async def test_a_page_refused_at_any_call_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever allocate, extend or fork finds no page: every request ends with the right tokens, and no page is lost."""
    monkeypatch.setattr(runtime_module, "PagedKvCache", StingyCache)
    number = 1
    while await _refused_at(number):
        number += 1
    assert number > 20


# -- clocks ---------------------------------------------------------------------------------------------------------------

DAY_S = 86400.0


@pytest.fixture
def leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Move the monotonic clock of everything in this process, as a machine that was paused finds it."""
    offset, real = 0.0, time.monotonic

    def forward(seconds: float) -> None:
        nonlocal offset
        offset += seconds

    monkeypatch.setattr(time, "monotonic", lambda: real() + offset)
    return forward


async def test_a_clock_that_leaps_a_day_ends_what_had_a_deadline(leap: Callable[[float], None]) -> None:
    """The request whose time has passed ends with what it has; one without a deadline gets all its text, and so do later
    ones, with a deadline or without."""
    async with fake_engine(step_s=0.0005) as (engine, _):
        async with (
            engine.infer_stream("late", max_tokens=900, deadline_s=3600.0) as late,
            engine.infer_stream("patient", max_tokens=60) as patient,
        ):
            first, other = await anext(aiter(late)), await anext(aiter(patient))
            leap(DAY_S)
            chunks = [first, *[chunk async for chunk in late]]
            assert chunks[-1].finish_reason is FinishReason.DEADLINE
            assert other.text + "".join([chunk.text async for chunk in patient]) == text_after("patient", 60)
        response = await engine.infer("next", max_tokens=5, deadline_s=3600.0)
        assert response.text == text_after("next", 5)
        assert response.metrics is not None
        assert 0 <= response.metrics.total_s < DAY_S
        assert engine.status_now().pages.active == 0


async def test_a_leap_while_nothing_is_under_way_changes_nothing(leap: Callable[[float], None]) -> None:
    """An engine that was idle for a day serves as before, and says how long it is up."""
    async with fake_engine() as (engine, _):
        await engine.infer("x", max_tokens=3)
        leap(DAY_S)
        assert (await engine.infer("y", max_tokens=3, deadline_s=60.0)).text == text_after("y", 3)
        assert (await engine.status()).uptime_s > DAY_S


@pytest.mark.parametrize("seconds", [DAY_S, -DAY_S], ids=["forward", "back"])
async def test_the_wall_clock_changes_nothing(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets the date while requests run moves no deadline."""
    real = time.time
    async with fake_engine(step_s=0.0005) as (engine, _):
        async with engine.infer_stream("x", max_tokens=30, deadline_s=60.0) as chunks:
            first = await anext(aiter(chunks))
            monkeypatch.setattr(time, "time", lambda: real() + seconds)
            assert first.text + "".join([chunk.text async for chunk in chunks]) == text_after("x", 30)


# -- the host -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.15, pytest.param(5.0, marks=pytest.mark.slow)])
async def test_a_host_that_blocks_its_loop_is_told(seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    """No request is lost, the lag is in the metrics, and the log says it once however often it happens."""
    caplog.set_level(logging.WARNING, logger="ferrum_rt")
    async with fake_engine(step_s=0.001) as (engine, _):
        assert engine.metrics().max_loop_lag_s < lag.REPORTED_S
        async with engine.infer_stream("x", max_tokens=60) as chunks:
            text = (await anext(aiter(chunks))).text
            for pause in (seconds, lag.REPORTED_S + 0.02):
                time.sleep(pause)  # noqa: ASYNC251 - that is the fault
                text += (await anext(aiter(chunks))).text
            text += "".join([chunk.text async for chunk in chunks])
        assert text == text_after("x", 60)
        metrics = engine.metrics()
    assert seconds - 0.05 < metrics.max_loop_lag_s <= metrics.loop_lag_s < seconds + 1.0
    assert [record.name for record in caplog.records] == ["ferrum_rt"]
    assert "blocked" in caplog.text


async def test_what_was_computed_in_time_counts_however_late_the_host_looks() -> None:
    """Both tokens are computed before the deadline, in steps that end while the host keeps the event loop: the request is
    finished, not late. One with more to do ends there with what there is."""
    async with fake_engine(step_s=0.01) as (engine, executor):
        async with engine.infer_stream("x", max_tokens=2, deadline_s=0.1) as chunks:
            await until(lambda: executor.num_steps == 1)
            time.sleep(0.15)  # noqa: ASYNC251 - that is the fault
            received = [chunk async for chunk in chunks]
        assert "".join(chunk.text for chunk in received) == text_after("x", 2)
        assert received[-1].finish_reason is FinishReason.LENGTH
        async with engine.infer_stream("y", max_tokens=900, deadline_s=0.1) as chunks:
            time.sleep(0.15)  # noqa: ASYNC251 - not a step of it has run
            with pytest.raises(DeadlineExceeded):
                await anext(aiter(chunks))


async def test_an_idle_engine_wakes_nobody() -> None:
    """With no request under way no timer is set and no thread posts anything, so the process can sleep."""
    async with fake_engine() as (engine, _):
        await engine.infer("x", max_tokens=3)
        await until(lambda: engine.status_now().requests.running == 0)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        timers = [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
        assert timers == []


# -- loading --------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _loading(config: EngineConfig, made: list[FakeExecutor], gate: threading.Event) -> AsyncIterator[None]:
    def load(config: EngineConfig) -> Any:
        assert gate.wait(10)
        made.append(FakeExecutor(config))
        return fake_model(config, made[0])

    async with Runtime(config, load):
        yield


async def test_a_model_loaded_for_nobody_is_closed() -> None:
    """A host that is cancelled while the model loads: opening ends when the load has, and the executor is closed."""
    made: list[FakeExecutor] = []
    gate = threading.Event()
    with anyio.CancelScope() as scope:
        scope.cancel()
        threading.Timer(0.01, gate.set).start()
        async with _loading(build_config(None, None, {}), made, gate):
            raise AssertionError("it was opened")
    assert [executor.is_closed for executor in made] == [True]
