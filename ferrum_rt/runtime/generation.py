"""One request inside the runtime: its stream, its text so far, and its one end."""

import math
from collections.abc import Callable
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.scheduler import SequenceUpdate
from ferrum_rt.interfaces.tokenizer import Tokenizer
from ferrum_rt.interfaces.types import (
    FinishReason,
    InferenceRequest,
    InferenceResponse,
    RequestId,
    RequestMetrics,
    StreamChunk,
    TokenId,
    Usage,
)
from ferrum_rt.runtime.detokenizer import StopStrings

# Chunks that can still come after a sequence was parked: of the steps in flight, committed and on their way.
_SLACK = 8


class Generation:
    """Lives from admission to its terminal event. ``on_room`` is called when a reader that was slow has caught up."""

    def __init__(self, request: InferenceRequest, capacity: int, now: float, on_room: Callable[[RequestId], None]) -> None:
        self.request = request
        self.submitted_at = now
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.is_parked = False
        self._capacity = capacity
        self._on_room = on_room
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._stop = StopStrings(request.sampling_params.stop, include=request.sampling_params.include_stop)
        self._send: MemoryObjectSendStream[StreamChunk | FerrumError]
        self._receive: MemoryObjectReceiveStream[StreamChunk | FerrumError]
        self._send, self._receive = anyio.create_memory_object_stream(capacity + _SLACK)

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    @property
    def must_park(self) -> bool:
        """The reader has as many chunks waiting as it may have."""
        return self._send.statistics().current_buffer_used >= self._capacity

    def tokenized(self, prompt: list[TokenId], tokenizer: Tokenizer | None) -> None:
        """The prompt's tokens are known; text can be made from here on."""
        self._usage = Usage(prompt_tokens=len(prompt), completion_tokens=0)
        skip = self.request.sampling_params.skip_special_tokens
        self._decoder = tokenizer.incremental(prompt, skip_special_tokens=skip) if tokenizer else None

    def advance(self, update: SequenceUpdate, now: float) -> FinishReason | None:
        """Send on what a step brought; returns a reason if that ends the request."""
        if self.first_token_at is None and update.token_ids:
            self.first_token_at = now
        reason = update.finish_reason
        text = ""
        for token_id in update.token_ids:
            # The token that ends a text is not part of it, unless asked for.
            is_end = reason in (FinishReason.EOS, FinishReason.STOP)
            if self._decoder is None or (is_end and not self.request.sampling_params.include_stop):
                continue
            piece, stopped = self._stop.push(self._decoder.push(token_id))
            text += piece
            if stopped:
                reason = FinishReason.STOP
                break
        if reason is not None:
            text += self._stop.flush()
        self._usage = Usage(
            prompt_tokens=self._usage.prompt_tokens,
            completion_tokens=self._usage.completion_tokens + len(update.token_ids),
            cached_tokens=update.num_cached_tokens,
        )
        self._send.send_nowait(
            StreamChunk(
                request_id=self.request.id,
                text=text,
                token_ids=update.token_ids,
                finish_reason=reason,
                usage=self._usage if reason else None,
            )
        )
        return reason

    def fail(self, error: FerrumError) -> None:
        """The reader gets ``error`` after the chunks that are on their way."""
        self._send.send_nowait(error)

    def close(self, now: float) -> None:
        """No more is coming. Whatever the reader has not taken yet stays for it."""
        self.finished_at = now
        self._send.close()

    def abandon(self) -> None:
        """Nobody reads any more."""
        self._send.close()
        self._receive.close()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> StreamChunk:
        try:
            item = await self._receive.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if self.is_parked and self._send.statistics().current_buffer_used <= self._capacity // 2:
            self.is_parked = False
            self._on_room(self.request.id)
        if isinstance(item, FerrumError):
            raise item
        return item

    async def collect(self) -> InferenceResponse:
        """Read to the end."""
        texts: list[str] = []
        token_ids: list[TokenId] = []
        last: dict[str, Any] = {}
        async for chunk in self:
            texts.append(chunk.text)
            token_ids.extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                last = {"finish_reason": chunk.finish_reason, "usage": chunk.usage}
        return InferenceResponse(
            request_id=self.request.id,
            text="".join(texts),
            token_ids=token_ids,
            metrics=self._metrics(),
            **last,
        )

    def _metrics(self) -> RequestMetrics:
        def since(moment: float | None) -> float:
            return math.nan if moment is None else moment - self.submitted_at

        return RequestMetrics(
            queue_s=since(self.started_at), ttft_s=since(self.first_token_at), total_s=since(self.finished_at)
        )
