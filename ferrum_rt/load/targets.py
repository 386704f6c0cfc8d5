"""Whom a load is put on: an engine in this process, a daemon, or a server that speaks OpenAI's protocol."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.errors import DeadlineExceeded
from ferrum_rt.interfaces.types import FinishReason, PageCounts, RequestCounts, StreamChunk
from ferrum_rt.load.workload import LoadRequest


class TargetError(Exception):
    """An answer that is none, of a target that is not ours. It counts by its ``code``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Target(Protocol):
    """Somebody who generates. Errors that it raises count by their code, or else by their class."""

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
            yield _count(chunks)

    async def state(self) -> tuple[RequestCounts, PageCounts] | None:
        status = await self._engine.status()
        return status.requests, status.pages


async def _count(chunks: AsyncIterator[StreamChunk]) -> AsyncIterator[int]:
    async for chunk in chunks:
        yield len(chunk.token_ids)
        if chunk.finish_reason is FinishReason.DEADLINE:  # an answer that is cut short is none
            raise DeadlineExceeded("the deadline passed before the last token")
