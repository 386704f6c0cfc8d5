"""One request inside the runtime: its outputs so far, where they go, and its one end."""

import math
from collections.abc import Sequence

import msgspec
from opentelemetry.trace import INVALID_SPAN, Span

from ferrum_rt.interfaces.engine import ChunkSink
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.sampler import TokenScores
from ferrum_rt.interfaces.scheduler import SequenceUpdate
from ferrum_rt.interfaces.tokenizer import Tokenizer
from ferrum_rt.interfaces.types import (
    FinishReason,
    InferenceRequest,
    RequestMetrics,
    TokenId,
    TokenLogprobs,
)
from ferrum_rt.runtime.output_text import OutputText, TokenOffsets
from ferrum_rt.runtime.tool_calls import ToolCallParser, ToolFormat
from ferrum_rt.runtime.tracing import end_span


class Generation:
    """Lives from admission to its terminal event."""

    def __init__(self, request: InferenceRequest, sink: ChunkSink, now: float) -> None:
        self.request, self.sink = request, sink
        self.span: Span = INVALID_SPAN
        self.submitted_at = now
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.error: FerrumError | None = None
        self.is_parked = False
        self.is_queued = True
        """Until tokenizer and grammar compiler are done with it, even if it ends while it waits for them."""
        self._outputs: list[OutputText] = []
        self._prompt: list[TokenId] = []
        self._prompt_scores: list[TokenScores] = []
        self._tokenizer: Tokenizer | None = None

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    @property
    def has_ended(self) -> bool:
        """Every output has its last chunk."""
        return all(output.is_finished for output in self._outputs)

    @property
    def num_prompt_tokens(self) -> int:
        """0 until it is tokenized."""
        return len(self._prompt)

    @property
    def num_output_tokens(self) -> int:
        """Of all its outputs, so far."""
        return sum(output.num_tokens for output in self._outputs)

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
        self.sink.put(chunk)
        return chunk.finish_reason

    def fail(self, error: FerrumError) -> None:
        """The reader gets ``error`` after the chunks that are on their way."""
        self.error = error
        self.sink.put(error)

    def close(self, now: float) -> None:
        """No more is coming."""
        self.finished_at = now
        end_span(
            self.span,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=self.num_output_tokens,
            error=self.error,
        )
        self.sink.close()

    def metrics(self) -> RequestMetrics:
        """Seconds from submission; NaN for what has not happened."""

        def since(moment: float | None) -> float:
            return math.nan if moment is None else moment - self.submitted_at

        return RequestMetrics(
            queue_s=since(self.started_at), ttft_s=since(self.first_token_at), total_s=since(self.finished_at)
        )

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
        self._prompt_scores = []
        return described
