"""Runs a scenario once for each of its suspensions, and cancels it exactly there."""

import asyncio
import itertools
import os
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Literal

import anyio
import anyio.lowlevel

from tests.faults.scenarios import CountingRuntime, Scenario
from tests.faults.tracing import Tracer, nothing
from tests.runtime.engines import text_after, until

How = Literal["scope", "task", "task again", "all"]
"""Cancelled is anyio's scope around the task under test; the asyncio task itself, once or at three more suspensions;
or every task there is, as when asyncio.run ends."""

MANY = 2000
MISSES = 3  # runs one after the other that have fewer suspensions: how many there are depends on the threads' times


async def cancel_callers(scenario: Scenario, how: How, tracer: Tracer, *, own: bool) -> int:
    """Cancel the caller at each suspension of its own, or, with ``own``, of any task at an await of ours; after each the
    engine must be as if nothing had happened. Returns how many there were."""
    async with scenario.runtime() as opened:
        assert isinstance(opened, CountingRuntime)
        engine = opened
        misses = 0
        for at in itertools.count(1):
            assert at < MANY
            is_hit = await cancelled_at(at, how, tracer, partial(scenario.act_on, engine), own=own)
            engine.check_nothing_is_under_way()
            assert (await engine.infer("next", max_tokens=3)).text == text_after("next", 3)
            if (misses := 0 if is_hit else misses + 1) == MISSES:
                return at - MISSES
    raise AssertionError


async def cancel_hosts(scenario: Scenario, how: How, tracer: Tracer, *, own: bool) -> int:
    """The same for the task that opens the engine: afterwards nothing of it is left."""
    misses = 0
    for at in itertools.count(1):
        assert at < MANY
        engine = scenario.runtime()
        before = left_overs()
        is_hit = await cancelled_at(at, how, tracer, partial(scenario.act_on, engine), own=own)
        assert left_overs() == before
        assert all(executor.is_closed for executor in engine.executors)
        if hasattr(engine, "_engine"):  # it came so far
            engine.check_nothing_is_under_way()
        if (misses := 0 if is_hit else misses + 1) == MISSES:
            return at - MISSES
    raise AssertionError


async def cancelled_at(
    number: int, how: How, tracer: Tracer, act: Callable[[], Awaitable[None]], *, own: bool, of: str = ""
) -> bool:
    """Run ``act`` as the task under test and cancel it at its suspension ``number``, counted from 1; with ``own`` those of
    all tasks at awaits whose names begin with ``of`` count too. False if it had not so many."""
    left = number
    cancel: Callable[[], object]

    def on_suspend(is_watched: bool, at: list[str]) -> None:
        nonlocal left
        if is_watched or (own and any(name.startswith(of) for name in at)):
            left -= 1
            if left == 0 or (how == "task again" and is_watched and -3 <= left < 0):
                cancel()

    async def begun() -> None:
        tracer.on_suspend = on_suspend
        await act()

    if how == "scope":
        with anyio.CancelScope() as scope:
            cancel = scope.cancel
            await tracer.watch(begun())
    else:
        ours = asyncio.all_tasks()
        task = asyncio.ensure_future(tracer.watch(begun()))
        cancel = task.cancel if how != "all" else (lambda: [one.cancel() for one in asyncio.all_tasks() - ours])
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
    tracer.on_suspend = nothing
    for _ in range(3):  # a task that has ended is still there for a turn
        await anyio.lowlevel.checkpoint()
    return left <= 0


async def cancel_clients(scenario: Scenario, how: How, tracer: Tracer, path: Path, runtime: CountingRuntime) -> int:
    """The same for what a client does in ``scenario``, given the path of a daemon in this process: afterwards the engine has
    nothing under way, and no task and no descriptor is left."""
    misses = 0
    for at in itertools.count(1):
        assert at < MANY
        before = left_overs()
        is_hit = await cancelled_at(at, how, tracer, partial(scenario.act_on, path), own=True, of="ipc/")
        await until(partial(_is_back, before, runtime))
        runtime.check_nothing_is_under_way()
        if (misses := 0 if is_hit else misses + 1) == MISSES:
            return at - MISSES
    raise AssertionError


def _is_back(before: tuple[object, ...], runtime: CountingRuntime) -> bool:
    return left_overs() == before and not runtime._active


def left_overs() -> tuple[set[threading.Thread], int, set[str]]:
    """Threads, the number of tasks, and descriptors there are."""
    try:
        num_tasks = len(asyncio.all_tasks())
    except RuntimeError:  # another event loop's
        num_tasks = 0
    return set(threading.enumerate()), num_tasks, set(os.listdir("/proc/self/fd"))
