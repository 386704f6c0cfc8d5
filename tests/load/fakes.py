"""Targets that answer as a test wants it, loads to put on them, and where their spans go."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio.lowlevel

from ferrum_rt.interfaces.types import PageCounts, RequestCounts, TokenId
from ferrum_rt.load.driver import put_on
from ferrum_rt.load.results import Repeat, RequestRecord
from ferrum_rt.load.targets import Target
from ferrum_rt.load.workload import LoadRequest

Pace = Callable[[LoadRequest], Awaitable[object]]


async def at_once(request: LoadRequest) -> None:
    await anyio.lowlevel.checkpoint()


class FakeTarget:
    """Streams a request's tokens one by one, and awaits ``pace`` before each. ``num_open`` streams are open, and
    ``most_open`` have been at a time."""

    def __init__(self, pace: Pace = at_once) -> None:
        self._pace = pace
        self.num_open = self.most_open = 0

    @asynccontextmanager
    async def stream(self, request: LoadRequest) -> AsyncIterator[AsyncIterator[int]]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            yield self._tokens(request)
        finally:
            self.num_open -= 1

    async def _tokens(self, request: LoadRequest) -> AsyncIterator[int]:
        for _ in range(request.output_tokens):
            await self._pace(request)
            yield 1

    async def state(self) -> tuple[RequestCounts, PageCounts] | None:
        return None


def load_requests(count: int, *, every_s: float | None = None, output_tokens: int = 3) -> list[LoadRequest]:
    """Small ones, due so many seconds apart or in the closed loop."""
    return [
        LoadRequest(
            index=index,
            token_ids=[TokenId(index % 250)] * 4,
            output_tokens=output_tokens,
            due_s=None if every_s is None else index * every_s,
        )
        for index in range(count)
    ]


def ignore(record: RequestRecord) -> None:
    pass


async def run_load(target: Target, requests: list[LoadRequest], *, concurrency: int = 1) -> Repeat:
    """``put_on`` within ten seconds."""
    with anyio.fail_after(10):
        return await put_on(target, requests, concurrency=concurrency, on_end=ignore)


def run_now(target: Target, requests: list[LoadRequest], *, concurrency: int = 1) -> Repeat:
    """For tests that are not async, as hypothesis wants them."""
    return anyio.run(partial(run_load, target, requests, concurrency=concurrency))
