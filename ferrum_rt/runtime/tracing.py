"""A request's span, by OpenTelemetry's conventions for generative AI, and below it one for each phase: they follow one upon
the other without a gap, so that they add up to the whole. It uses the API alone: in a process without an SDK a request costs
a microsecond. It holds no text, unless ``monitoring.capture_content`` asks for it.

What the host's SDK raises is logged, and is no request's trouble.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, Status, StatusCode

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.requests import is_chat
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.interfaces.types import ChatMessage, FinishReason, InferenceRequest, ModelId, StreamChunk

_TRACER = trace.get_tracer(names.SCOPE)
_log = logging.getLogger("ferrum_rt")
_Given = ParamSpec("_Given")


def operation_of(request: InferenceRequest) -> str:
    """By the conventions' names."""
    return names.CHAT if is_chat(request.prompt) else names.TEXT_COMPLETION


def _guarded(
    method: Callable[Concatenate["RequestTrace", _Given], None],
) -> Callable[Concatenate["RequestTrace", _Given], None]:
    """What the SDK raises is logged, and nothing more is recorded of the request."""

    @wraps(method)
    def call(self: "RequestTrace", /, *given: _Given.args, **named: _Given.kwargs) -> None:
        if not self.is_recording:
            return
        try:
            method(self, *given, **named)
        except Exception as fault:  # its class alone, for its message may quote anything
            self.is_recording = False
            _log.warning("a span could not be recorded, and the request goes on without: %s", type(fault).__name__)

    return call


class RequestTrace:
    """The spans of a request that was admitted, as children of the span that is current. Moments are in time.monotonic()'s
    seconds. Where nobody records, no method does anything."""

    def __init__(self, request: InferenceRequest, model: ModelId, now: float, *, captures: bool = False) -> None:
        self.is_recording = True
        self._span: Span = INVALID_SPAN
        self._phase_span: Span = INVALID_SPAN
        self._phase: Phase | None = None
        self._captures = captures
        self._reasons: dict[int, FinishReason] = {}
        self._texts: dict[int, str] = {}
        # Spans are on the wall clock. A step of that clock in a request's time would make its phases overlap.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._begin(request, model, now)

    @property
    def link(self) -> Link | None:
        """To the request's span; None if nobody records."""
        return Link(self._span.get_span_context()) if self.is_recording else None

    @_guarded
    def _begin(self, request: InferenceRequest, model: ModelId, now: float) -> None:
        is_remote = trace.get_current_span().get_span_context().is_remote
        operation = operation_of(request)
        self._span = _TRACER.start_span(
            f"{operation} {model}", kind=SpanKind.SERVER if is_remote else SpanKind.INTERNAL, start_time=self._ns(now)
        )
        self.is_recording = self._span.is_recording()
        if not self.is_recording:
            return
        self._span.set_attributes(_described(request, operation, model))
        if self._captures:
            self._span.set_attribute(names.INPUT_MESSAGES, _input_messages(request))
        self.enter(Phase.QUEUE, now)

    @_guarded
    def enter(self, phase: Phase, now: float) -> None:
        """The phase that it was in is over."""
        if phase is self._phase:
            return
        at = self._ns(now)
        if self._phase is not None:
            self._phase_span.end(at)
        self._phase = phase
        self._phase_span = _TRACER.start_span(phase.value, trace.set_span_in_context(self._span), start_time=at)

    @_guarded
    def start(self, now: float) -> None:
        """One of its samples has got a slot; the first of them, if it waited."""
        if self._phase in (Phase.QUEUE, Phase.PREEMPTED):
            self.enter(Phase.PREFILL, now)

    @_guarded
    def preempt(self, now: float) -> None:
        """None of its samples has a slot any more. Who is parked has no use for one."""
        if self._phase in (Phase.PREFILL, Phase.DECODE):
            self.enter(Phase.PREEMPTED, now)

    @_guarded
    def chunk(self, num_tokens: int, position: int, now: float) -> None:
        """A step is on its way that computes so many tokens of it from ``position`` on."""
        event = {names.CHUNK_TOKENS: num_tokens, names.CHUNK_POSITION: position}
        self._phase_span.add_event(names.CHUNK_EVENT, event, self._ns(now))

    def advance(self, chunk: StreamChunk, now: float) -> None:
        """This goes to the reader. Of most chunks there is nothing to record, and they are many."""
        if self.is_recording and (self._phase is not Phase.DECODE or chunk.finish_reason is not None or self._captures):
            self._advance(chunk, now)

    @_guarded
    def _advance(self, chunk: StreamChunk, now: float) -> None:
        if self._phase is Phase.PREFILL:
            self.enter(Phase.DECODE, now)
        if chunk.finish_reason is not None:
            self._reasons[chunk.index] = chunk.finish_reason
        if chunk.usage is not None:
            self._span.set_attribute(names.CACHED_TOKENS, chunk.usage.cached_tokens)
        if self._captures:
            self._texts[chunk.index] = self._texts.get(chunk.index, "") + chunk.text

    @_guarded
    def end(
        self, now: float, *, outcome: str, ttft_s: float | None, prompt_tokens: int, output_tokens: int, error: str | None
    ) -> None:
        """At the request's one end. Of an ``error`` the code is told, not the message, which may quote the prompt."""
        at = self._ns(now)
        self._phase_span.end(at)
        reasons = [self._reasons[index].value for index in sorted(self._reasons)]
        self._span.set_attributes(
            {
                names.OUTCOME: outcome,
                names.INPUT_TOKENS: prompt_tokens,
                names.OUTPUT_TOKENS: output_tokens,
                names.FINISH_REASONS: reasons,
            }
        )
        if ttft_s is not None:
            self._span.set_attribute(names.TIME_TO_FIRST_CHUNK, ttft_s)
        if self._captures:
            self._span.set_attribute(names.OUTPUT_MESSAGES, _output_messages(self._texts, self._reasons))
        if error is not None:
            self._span.set_attribute(names.ERROR_TYPE, error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(at)

    def _ns(self, moment: float) -> int:
        return self._epoch_ns + int(moment * 1e9)


def _described(request: InferenceRequest, operation: str, model: ModelId) -> dict[str, Any]:
    params = request.sampling_params
    asked = {
        names.MAX_TOKENS: params.max_tokens,
        names.TEMPERATURE: params.temperature,
        names.TOP_P: params.top_p,
        names.TOP_K: params.top_k,
        names.SEED: params.seed,
        names.CHOICE_COUNT: params.n if params.n > 1 else None,
        names.CONVERSATION_ID: request.session_id,
    }
    return {
        names.OPERATION_NAME: operation,
        names.PROVIDER_NAME: names.PROVIDER,
        names.REQUEST_MODEL: model,
        names.RESPONSE_MODEL: model,
        names.RESPONSE_ID: request.id,
        names.CLIENT: request.client_id,
        names.PRIORITY: request.priority.name.lower(),
        **{name: value for name, value in asked.items() if value is not None},
    }


def _input_messages(request: InferenceRequest) -> str:
    """As JSON, in the conventions' form."""
    prompt = request.prompt
    if isinstance(prompt, str):
        turns = [("user", prompt)]
    elif is_chat(prompt):
        turns = [(message.role, message.content) for message in prompt if isinstance(message, ChatMessage)]
    else:
        turns = [("user", json.dumps([token for token in prompt if isinstance(token, int)]))]
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]} for role, text in turns])


def _output_messages(texts: Mapping[int, str], reasons: Mapping[int, FinishReason]) -> str:
    return json.dumps(
        [
            {
                "role": "assistant",
                "parts": [{"type": "text", "content": text}],
                "finish_reason": reasons.get(index, FinishReason.ERROR).value,
            }
            for index, text in sorted(texts.items())
        ]
    )
