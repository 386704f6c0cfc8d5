"""Opening and closing a runtime: whatever happens meanwhile, nothing is left behind."""

import gc
import threading
import time

import anyio
import anyio.lowlevel
import pytest

from ferrum_rt import Cancelled, EngineConfig, TokenizerError
from ferrum_rt.interfaces.types import EngineState
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from tests.runtime.engines import fake_engine, text_after, until


async def test_shutdown_lets_running_requests_finish() -> None:
    """Requests under way are drained, new ones refused, and the caller's own task goes on."""
    async with fake_engine(step_s=0.002) as (engine, _), anyio.create_task_group() as tasks:
        results: list[str] = []

        async def read() -> None:
            results.append((await engine.infer("x", max_tokens=20)).text)

        tasks.start_soon(read)
        await until(lambda: engine.metrics().scheduler.running == 1)
        await engine.shutdown()
        assert results == [text_after("x", 20)] or engine.metrics().scheduler.running == 0
        with pytest.raises(Cancelled):
            await engine.infer("y")
        await anyio.lowlevel.checkpoint()  # a cancelled host would fail here
    assert results == [text_after("x", 20)]
    assert (await engine.status()).state is EngineState.STOPPED


async def test_shutdown_cancels_what_does_not_finish_in_time() -> None:
    """Past the drain limit a request ends with Cancelled."""
    async with fake_engine({"scheduler": {"drain_s": 0.02}}, step_s=0.002) as (engine, _):
        async with engine.infer_stream("x", max_tokens=1000) as stream:
            await anext(aiter(stream))
            await engine.shutdown()
            with pytest.raises(Cancelled):
                _ = [chunk async for chunk in stream]


async def test_nothing_is_left_after_closing() -> None:
    """Threads are gone and pages free, after requests that finished, were cancelled, and were under way."""
    threads = set(threading.enumerate())
    async with fake_engine({"scheduler": {"drain_s": 0.0}}) as (engine, _):
        await engine.infer("x", max_tokens=5)
        async with engine.infer_stream("x", max_tokens=100):
            pass
        async with engine.infer_stream("y", max_tokens=1000) as stream:
            await engine.shutdown()
            del stream
    assert set(threading.enumerate()) == threads
    assert engine.metrics().scheduler.pages.active == 0


async def test_the_hosts_exception_comes_out_as_it_is() -> None:
    """An error in the host's block ends the engine and is raised unwrapped; running requests do not delay it."""
    began = time.monotonic()

    async def host() -> None:
        async with fake_engine(step_s=0.001) as (engine, _):
            engines.append(engine)
            async with engine.infer_stream("x", max_tokens=1000) as stream:
                await anext(aiter(stream))
                raise ZeroDivisionError

    engines: list[Runtime] = []
    with pytest.raises(ZeroDivisionError):
        await host()
    assert time.monotonic() - began < 5
    assert engines[0].metrics().scheduler.pages.active == 0


async def test_a_cancelled_host_closes_the_engine() -> None:
    """Cancelling the task that opened the engine closes it, threads and all."""
    threads = set(threading.enumerate())
    with anyio.move_on_after(0.05) as scope:
        async with fake_engine(step_s=0.001) as (engine, _):
            await engine.infer("x", max_tokens=1000)
    assert scope.cancelled_caught
    assert set(threading.enumerate()) == threads
    assert engine.metrics().scheduler.pages.active == 0


async def test_a_host_cancelled_while_the_engine_drains() -> None:
    """Cancelling the host in the middle of closing still closes everything, at once."""
    threads = set(threading.enumerate())
    with anyio.CancelScope() as scope:
        async with (
            fake_engine({"scheduler": {"drain_s": 60.0}}, step_s=0.001) as (engine, _),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(lambda: engine.infer("x", max_tokens=1000))
            await until(lambda: engine.metrics().scheduler.running == 1)
            tasks.start_soon(engine.shutdown)
            await until(lambda: engine._state is EngineState.DRAINING)
            scope.cancel()
    assert scope.cancelled_caught
    assert set(threading.enumerate()) == threads
    assert engine.metrics().scheduler.pages.active == 0


async def test_an_engine_abandoned_by_its_last_line_is_drained_until_the_host_is_cancelled() -> None:
    """Leaving the block waits for a request of another task; cancelling that wait leaves no thread and no page."""
    threads = set(threading.enumerate())
    engines: list[Runtime] = []

    async def host() -> None:
        async with fake_engine({"scheduler": {"drain_s": 60.0}}, step_s=0.001) as (engine, _):
            engines.append(engine)
            await until(lambda: engine.metrics().scheduler.running == 1)

    async def other() -> None:
        await until(lambda: bool(engines))
        with pytest.raises(Cancelled):
            await engines[0].infer("x", max_tokens=1000)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as watched:
                watched.start_soon(host)
                await until(lambda: bool(engines) and engines[0]._state is EngineState.DRAINING)
                scope.cancel()
    assert set(threading.enumerate()) == threads
    assert engines[0].metrics().scheduler.pages.active == 0


async def test_an_engine_closed_as_soon_as_it_is_open() -> None:
    """A host that fails in its first line leaves no thread, and no channel open."""
    threads = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        async with fake_engine():
            raise ZeroDivisionError
    gc.collect()  # an open channel would warn here, and warnings are errors
    assert set(threading.enumerate()) == threads


async def test_a_model_that_cannot_be_loaded_leaves_nothing() -> None:
    """An error while opening is raised as it is, and the threads are gone."""
    threads = set(threading.enumerate())

    def load(config: EngineConfig) -> LoadedModel:
        raise TokenizerError("no")

    with pytest.raises(TokenizerError, match="no"):
        async with Runtime(EngineConfig(), load):
            pass
    assert set(threading.enumerate()) == threads


def test_trio_runs_it_too() -> None:
    """The runtime uses anyio alone, so the whole of it works under trio."""

    async def main() -> None:
        async with fake_engine() as (engine, _):
            assert (await engine.infer("hello", max_tokens=12)).text == text_after("hello", 12)
            async with engine.infer_stream("x", max_tokens=1000) as stream:
                await anext(aiter(stream))
            assert engine.metrics().scheduler.pages.active == 0

    anyio.run(main, backend="trio")
