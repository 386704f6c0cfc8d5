"""The engine as its callers see it, in-process or over a socket. One Protocol per modality; text generation is the first."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Unpack

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.requests import RequestFields
from ferrum_rt.interfaces.types import (
    DEFAULT_CLIENT,
    ClientId,
    EngineMetrics,
    EngineStatus,
    HealthStatus,
    InferenceRequest,
    InferenceResponse,
    Prompt,
    SessionId,
    StreamChunk,
)


class ChunkSink(Protocol):
    """Where a request's chunks go. All of it is called on the event loop, between awaits: nothing may block or raise."""

    @property
    def is_full(self) -> bool:
        """As many chunks wait in it as may; the request is parked until it is resumed."""
        ...

    def put(self, item: StreamChunk | FerrumError) -> None:
        """The next chunk, or as the last item why there are no more. A few still come after it is full: of the steps that
        were under way."""
        ...

    def close(self) -> None:
        """Nothing more is coming."""
        ...


class InferenceEngine(Protocol):
    """Text generation. A prompt is text, token ids or chat messages; ``fields`` are those of InferenceRequest and
    SamplingParams, flat. Cancelling the calling task cancels the request."""

    @property
    def config(self) -> EngineConfig: ...

    async def infer(self, prompt: Prompt | InferenceRequest, **fields: Unpack[RequestFields]) -> InferenceResponse: ...

    def infer_stream(
        self, prompt: Prompt | InferenceRequest, **fields: Unpack[RequestFields]
    ) -> AbstractAsyncContextManager[AsyncIterator[StreamChunk]]: ...

    async def infer_batch(
        self, prompts: Sequence[Prompt | InferenceRequest], **fields: Unpack[RequestFields]
    ) -> list[InferenceResponse | FerrumError]: ...

    async def end_session(self, session_id: SessionId, client_id: ClientId = DEFAULT_CLIENT) -> bool: ...

    async def fork_session(
        self, session_id: SessionId, new_session_id: SessionId, client_id: ClientId = DEFAULT_CLIENT
    ) -> None: ...

    def metrics(self) -> EngineMetrics: ...
    async def status(self) -> EngineStatus: ...
    async def health_check(self) -> HealthStatus: ...
    async def shutdown(self) -> None: ...
