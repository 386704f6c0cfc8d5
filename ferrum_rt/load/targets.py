"""Whom a load is put on: an engine in this process, a daemon, or a server that speaks OpenAI's protocol."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.types import PageCounts, RequestCounts
from ferrum_rt.load.workload import LoadRequest


class Target(Protocol):
    """Somebody who generates. Errors that it raises count by their code or class."""

    def stream(self, request: LoadRequest) -> AbstractAsyncContextManager[AsyncIterator[int]]:
        """How many tokens each chunk brings, as it comes."""
        ...

    async def state(self) -> tuple[RequestCounts, PageCounts] | None:
        """What it has under way; None if it cannot say."""
        ...


class EngineTarget:
    """An InferenceEngine, here or behind a socket."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def stream(self, request: LoadRequest) -> AsyncIterator[AsyncIterator[int]]:
        stream = self._engine.infer_stream(
            list(request.token_ids),
            max_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0.0,
            client_id=request.client,
            priority=request.priority,
            deadline_s=request.deadline_s,
        )
        async with stream as chunks:
            yield (len(chunk.token_ids) async for chunk in chunks)

    async def state(self) -> tuple[RequestCounts, PageCounts] | None:
        status = await self._engine.status()
        return status.requests, status.pages
