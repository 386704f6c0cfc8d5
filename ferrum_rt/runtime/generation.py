"""One request inside the runtime: its stream, its outputs so far, and its one end."""

import math
from collections.abc import Callable, Sequence

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.responses import assemble
from ferrum_rt.interfaces.sampler import TokenScores
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
    TokenLogprobs,
)
from ferrum_rt.runtime.output_text import OutputText, TokenOffsets
from ferrum_rt.runtime.tool_calls import ToolCallParser, ToolFormat

# Chunks of each output that can still come after a request was parked: of the steps in flight, committed and on their way.
_SLACK = 8


class Generation:
    """Lives from admission to its terminal event. ``on_room`` is called when a reader that was slow has caught up."""

    def __init__(self, request: InferenceRequest, capacity: int, now: float, on_room: Callable[[RequestId], None]) -> None:
        num_outputs = request.sampling_params.n
        self.request = request
        self.submitted_at = now
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.is_parked = False
        self._capacity = capacity * num_outputs
        self._on_room = on_room
        self._outputs: list[OutputText] = []
        self._prompt: list[TokenId] = []
        self._prompt_scores: list[TokenScores] = []
        self._tokenizer: Tokenizer | None = None
        self._send: MemoryObjectSendStream[StreamChunk | FerrumError]
        self._receive: MemoryObjectReceiveStream[StreamChunk | FerrumError]
        self._send, self._receive = anyio.create_memory_object_stream((capacity + _SLACK) * num_outputs)

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    @property
    def must_park(self) -> bool:
        """The reader has as many chunks waiting as it may have."""
        return self._send.statistics().current_buffer_used >= self._capacity

    @property
    def has_ended(self) -> bool:
        """Every output has its last chunk."""
        return all(output.is_finished for output in self._outputs)

    def tokenized(self, prompt: list[TokenId], tokenizer: Tokenizer | None, tools: ToolFormat | None) -> None:
        """The prompt's tokens are known; text can be made from here on. ``tools`` is how the model writes
        calls."""
        self._prompt, self._tokenizer = prompt, tokenizer
        has_calls = bool(self.request.tools) and self.request.tool_choice != "none"
        self._outputs = [
            OutputText(self.request, index, prompt, tokenizer, ToolCallParser(tools) if tools and has_calls else None)
            for index in range(self.request.sampling_params.n)
        ]

    def advance(self, update: SequenceUpdate, now: float) -> FinishReason | None:
        """Send on what a step brought; returns a reason if that ends its output."""
        self._prompt_scores += update.prompt_scores
        output = self._outputs[update.index]
        if output.is_finished or not (update.token_ids or update.finish_reason):
            return None
        chunk = output.advance(update)
        if self.first_token_at is None:
            self.first_token_at = now
            if self.request.sampling_params.prompt_logprobs is not None:
                chunk = msgspec.structs.replace(chunk, prompt_logprobs=self._describe_prompt())
        self._send.send_nowait(chunk)
        return chunk.finish_reason

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
        chunks = [chunk async for chunk in self]
        return assemble(chunks, self._metrics())

    def _describe_prompt(self) -> list[TokenLogprobs]:
        if self._tokenizer is None:
            return []
        skip = self.request.sampling_params.skip_special_tokens
        offsets = TokenOffsets(self._tokenizer, (), skip_special_tokens=skip)
        scores: Sequence[TokenScores | None] = [None, *self._prompt_scores]
        described = []
        for token_id, scored in zip(self._prompt, scores, strict=True):
            described.append(offsets.describe(token_id, scored))
            offsets.push(token_id)
        return described

    def _metrics(self) -> RequestMetrics:
        def since(moment: float | None) -> float:
            return math.nan if moment is None else moment - self.submitted_at

        return RequestMetrics(
            queue_s=since(self.started_at), ttft_s=since(self.first_token_at), total_s=since(self.finished_at)
        )
