"""A request's span, by OpenTelemetry's conventions for generative AI: a child of the span that is current where it is
admitted. It uses the API alone: in a process without an SDK it costs half a microsecond. It holds no text.

What the host's SDK raises is logged, and is no request's trouble.
"""

import logging

from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Span, Status, StatusCode

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.requests import is_chat
from ferrum_rt.interfaces.types import InferenceRequest, ModelId

_TRACER = trace.get_tracer("ferrum_rt")
_log = logging.getLogger("ferrum_rt")


def start_span(request: InferenceRequest, model: ModelId) -> Span:
    """The span of a request that was just admitted."""
    try:
        return _start(request, model)
    except Exception as fault:  # its class alone, for its message may quote anything
        _log.warning("no span could be started, and the request goes on without: %s", type(fault).__name__)
        return INVALID_SPAN


def end_span(span: Span, *, prompt_tokens: int, output_tokens: int, error: FerrumError | None) -> None:
    """At the request's one end. Of an error the class is told, not the message, which may quote the prompt."""
    try:
        _end(span, prompt_tokens, output_tokens, error)
    except Exception as fault:
        _log.warning("a span could not be ended: %s", type(fault).__name__)


def _start(request: InferenceRequest, model: ModelId) -> Span:
    operation = "chat" if is_chat(request.prompt) else "text_completion"
    span = _TRACER.start_span(f"{operation} {model}")
    if span.is_recording():
        params = request.sampling_params
        asked = {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.choice.count": params.n,
        }
        span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "ferrum_rt",
                "gen_ai.request.model": model,
                "gen_ai.response.id": request.id,
                **{name: value for name, value in asked.items() if value is not None},
            }
        )
    return span


def _end(span: Span, prompt_tokens: int, output_tokens: int, error: FerrumError | None) -> None:
    if span.is_recording():
        span.set_attributes({"gen_ai.usage.input_tokens": prompt_tokens, "gen_ai.usage.output_tokens": output_tokens})
        if error is not None:
            span.set_attribute("error.type", error.code)
            span.set_status(Status(StatusCode.ERROR))
    span.end()
