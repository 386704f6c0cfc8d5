"""One request inside the runtime: its outputs so far, where they go, and its one end."""

import math
from collections.abc import Sequence

import msgspec

from ferrum_rt.interfaces.engine import ChunkSink
from ferrum_rt.interfaces.errors import Cancelled, FerrumError
from ferrum_rt.interfaces.sampler import TokenScores
from ferrum_rt.interfaces.scheduler import SequenceUpdate
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.interfaces.tokenizer import Tokenizer
from ferrum_rt.interfaces.types import (
    FinishReason,
    InferenceRequest,
    ModelId,
    RequestMetrics,
    TokenId,
    TokenLogprobs,
)
from ferrum_rt.runtime.text.output_text import OutputText, TokenOffsets
from ferrum_rt.runtime.text.tool_calls import ToolCallParser, ToolFormat
from ferrum_rt.runtime.tracing import RequestTrace


class Generation:
    """Lives from admission to its terminal event. ``captures``: what it says goes into its spans."""

    def __init__(
        self, request: InferenceRequest, sink: ChunkSink, now: float, model: ModelId, *, captures: bool = False
    ) -> None:
        self.request, self.sink = request, sink
        self.trace = RequestTrace(request, model, now, captures=captures)
        self.submitted_at = now
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.outcome: str | None = None
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

    def started(self, now: float) -> None:
        """A step is on its way with one of its samples in a slot that it did not have before."""
        if self.started_at is None:
            self.started_at = now
        self.trace.start(now)

    def park(self, now: float) -> None:
        """Its sink is full."""
        self.is_parked = True
        self.trace.enter(Phase.PARKED, now)

    def unpark(self, now: float, *, runs: bool) -> None:
        """It has room again; whether it ``runs``, or must wait for a slot, the scheduler knows."""
        self.is_parked = False
        self.trace.enter(Phase.DECODE if runs else Phase.PREEMPTED, now)

    def advance(self, update: SequenceUpdate, now: float) -> FinishReason | None:
        """Send on what a step brought; returns a reason if that ends its output."""
        self._prompt_scores += update.prompt_scores
        output = self._outputs[update.index]
        if output.is_finished or not (update.token_ids or update.finish_reason):
            return None
        chunk = output.advance(update)
        self.trace.advance(chunk, now)
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

    @property
    def error_type(self) -> str | None:
        """The code of what it ended with instead of an output; ``cancelled`` also where nobody was there any more to be
        told."""
        if self.error is not None:
            return self.error.code
        return Cancelled.code if self.outcome == "cancelled" else None

    def close(self, outcome: str, now: float) -> None:
        """No more is coming."""
        self.outcome, self.finished_at = outcome, now
        self.trace.end(
            now,
            outcome=outcome,
            ttft_s=None if self.first_token_at is None else self.first_token_at - self.submitted_at,
            prompt_tokens=self.num_prompt_tokens,
            output_tokens=self.num_output_tokens,
            error=self.error_type,
        )
        self.sink.close()

    def metrics(self) -> RequestMetrics:
        """Seconds from submission; NaN for what has not happened."""
        moments = (self.started_at, self.first_token_at, self.finished_at)
        queue_s, ttft_s, total_s = (math.nan if moment is None else moment - self.submitted_at for moment in moments)
        return RequestMetrics(queue_s=queue_s, ttft_s=ttft_s, total_s=total_s)

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
