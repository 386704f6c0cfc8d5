"""A thread of our own, on which functions run in the order they are submitted.

The executor needs one (thread-local CUDA streams and OpenMP teams), and so does everything else that computes: anyio's
shared worker threads belong to the host, and outlive us.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel

from ferrum_rt.interfaces.errors import EngineFailed
from ferrum_rt.runtime.threads.lag import LoopLag

T = TypeVar("T")

JOIN_LIMIT_S = 60.0
STACK_BYTES = 16 * 1024 * 1024


@contextmanager
def deep_stacks() -> Iterator[None]:
    """Threads started meanwhile get a stack of ``STACK_BYTES``: native parsers recurse by as much as their input nests, and
    the end of a stack is the end of the process. Python has this setting for the whole process only; it is put back."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def finished(result: T) -> Future[T]:
    """A future that has its result."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


class Job(Generic[T]):
    """A submitted call; awaiting it gives its result or raises its error. It is done when the future is that the call
    returns, which may be long after the thread went on to the next."""

    def __init__(self, function: Callable[[], Future[T]]) -> None:
        self._function = function
        self._done = anyio.Event()
        self._future: Future[T]

    async def wait(self) -> T:
        await self._done.wait()
        return self._future.result()

    def run(self, on_done: Callable[[], None]) -> None:
        """In the worker thread; ``on_done`` is called in this one or in the future's."""
        try:
            self._future = self._function()
        except Exception as error:  # whatever it is, it belongs to the one who waits
            self._future = Future()
            self._future.set_exception(error)
        except BaseException as error:  # a panic of Rust code, say; the loop's thread must not take it for a cancellation
            failure = RuntimeError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            self._future = Future()
            self._future.set_exception(failure)
        self._future.add_done_callback(lambda _: on_done())

    @property
    def is_settled(self) -> bool:
        """It is done, and whoever waits for it knows."""
        return self._done.is_set()

    def settle(self) -> None:
        """In the event loop's thread."""
        self._done.set()

    def drop(self, error: Exception) -> None:
        """It will never be run to its end."""
        if not self._done.is_set():
            self._future = Future()
            self._future.set_exception(error)
            self._done.set()


class Worker:
    """Use as an async context manager; leaving it waits for the call that is running and drops those behind it. Where the
    thread ends by itself, the calls that it owed, and all later ones, raise EngineFailed."""

    def __init__(self, name: str, lag: LoopLag) -> None:
        self._queue: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._lag = lag
        self._owed: set[Job[Any]] = set()
        self._is_closing = False

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, function: Callable[[], Future[T]]) -> Job[T]:
        """Queue a call. The caller bounds how many are outstanding."""
        job = Job(function)
        if self._stopped.is_set():
            job.drop(self._death())
        else:
            self._owed.add(job)
            self._queue.put(job)
        return job

    async def run(self, function: Callable[[], T]) -> T:
        return await self.submit(lambda: finished(function())).wait()

    async def __aenter__(self) -> "Worker":
        self._token = anyio.lowlevel.current_token()
        self._stopped = anyio.Event()
        with deep_stacks():
            self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._is_closing = True
        self._queue.put(None)
        cancellation: BaseException | None = None
        with anyio.move_on_after(JOIN_LIMIT_S, shield=True) as limit:
            while not self._stopped.is_set():
                try:
                    await self._stopped.wait()
                except anyio.get_cancelled_exc_class() as error:
                    if limit.cancel_called:
                        raise
                    cancellation = error  # by asyncio itself, which knows no shield; what the thread uses must stay
            self._thread.join()
            if cancellation is not None:
                raise cancellation
            return
        raise EngineFailed(f"thread {self._thread.name} is stuck in a native call; it is left behind")

    def _main(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                if not self._is_closing:
                    job.run(partial(self._post_settled, job))
        finally:  # also where something ends the thread that is no call's result
            self._post(self._end)

    def _end(self) -> None:
        self._stopped.set()
        for job in self._owed:
            job.drop(self._death())
        self._owed.clear()

    def _death(self) -> EngineFailed:
        return EngineFailed(f"thread {self._thread.name} has ended; close the engine and open a new one")

    def _post_settled(self, job: Job[Any]) -> None:
        done_at = time.monotonic()

        def settle() -> None:
            self._lag.observe(done_at)
            self._owed.discard(job)
            job.settle()

        self._post(settle)

    def _post(self, function: Callable[[], None]) -> None:
        # Unlike anyio.from_thread.run_sync this does not wait for the loop: the next call starts while the host is busy.
        # A loop that is gone took everybody who waited with it.
        with suppress(anyio.RunFinishedError):
            self._token.backend_class.run_sync_soon(function, (), self._token.native_token)
