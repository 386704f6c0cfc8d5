"""Running coroutines step by step: where each is suspended, and a cancellation at exactly the suspension that is wanted."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from tests.faults.awaits import standing_at

Suspended = Callable[[bool, list[str]], None]


class Tracer:
    """``suspended`` and ``cancelled`` are the awaits at which a task stood, and those into which a cancellation was thrown.

    ``on_suspend`` is called before each suspension, with whether it is the task under test's and the awaits of ours at which
    the task stands. It may cancel what it likes: the suspension that follows is the one that is cancelled."""

    def __init__(self) -> None:
        self.suspended: set[str] = set()
        self.cancelled: set[str] = set()
        self.num_runs = 0
        self.on_suspend: Suspended = nothing

    async def watch(self, task: Coroutine[Any, Any, Any]) -> Any:
        """Run it as the task under test."""
        return await _Steps(task, self, is_watched=True)

    def factory(self, loop: asyncio.AbstractEventLoop, task: Any, **options: Any) -> Any:
        """For ``set_task_factory``: every task is followed."""
        return asyncio.Task(self._follow(task), loop=loop, **options)

    async def _follow(self, task: Coroutine[Any, Any, Any]) -> Any:
        return await _Steps(task, self, is_watched=False)


class _Steps:
    def __init__(self, task: Coroutine[Any, Any, Any], tracer: Tracer, *, is_watched: bool) -> None:
        self._task, self._tracer, self._is_watched = task, tracer, is_watched

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                waited_for = self._task.send(value) if error is None else self._task.throw(error)
            except StopIteration as end:
                return end.value
            at = standing_at(self._task)
            self._tracer.suspended.update(at)
            self._tracer.on_suspend(self._is_watched, at)
            try:
                value, error = (yield waited_for), None
            except GeneratorExit:
                self._task.close()
                raise
            except BaseException as thrown:  # a cancellation, of whichever event loop
                self._tracer.cancelled.update(at)
                value, error = None, thrown


def nothing(is_watched: bool, at: list[str]) -> None:
    """Let it be suspended."""
