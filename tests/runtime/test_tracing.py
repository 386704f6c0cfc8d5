"""A request's span: whose child it is, what it says, and what it keeps to itself."""

from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import BackendError, ResourceExhausted
from ferrum_rt.interfaces.types import ChatMessage
from ferrum_rt.ipc.client import connect
from ferrum_rt.runtime import tracing
from tests.daemon.serving import daemon
from tests.runtime.engines import fake_engine


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of this test go; the process's own provider is left alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))
    return exporter


def of_requests(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """Without those of their phases, in the order of their ends."""
    return [span for span in exporter.get_finished_spans() if names.OPERATION_NAME in (span.attributes or {})]


PARENT = trace.NonRecordingSpan(
    trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
)


async def test_a_span_is_its_callers_child_and_counts_tokens(spans: InMemorySpanExporter) -> None:
    """It belongs to the caller's trace and has the conventions' attributes, and no text."""
    async with fake_engine() as (engine, _):
        with trace.use_span(PARENT):
            await engine.infer("secret", max_tokens=4, seed=7, stop=["secret"], metadata={"a": "secret"})
    [span] = of_requests(spans)
    assert span.context is not None
    assert span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (0xABC, 0xDEF)
    assert span.name == "text_completion fake"
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.usage.input_tokens"] == 6
    assert attributes["gen_ai.usage.output_tokens"] == 4
    assert attributes["gen_ai.request.seed"] == 7
    assert not any("secret" in span.to_json() for span in spans.get_finished_spans())


async def test_a_span_crosses_the_socket(spans: InMemorySpanExporter, tmp_path: Path) -> None:
    """A request of a client's belongs to the trace that the client was in, and the next, made outside of it, does not."""
    async with daemon(tmp_path) as (_, path), connect(path) as client:
        with trace.use_span(PARENT):
            await client.infer([ChatMessage(role="user", content="x")], max_tokens=2)
        await client.infer("x", max_tokens=2)
    inside, outside = of_requests(spans)
    assert inside.context is not None
    assert inside.parent is not None
    assert (inside.context.trace_id, inside.parent.span_id, inside.name) == (0xABC, 0xDEF, "chat fake")
    assert outside.parent is None


async def test_a_failed_request_says_so_in_its_span(spans: InMemorySpanExporter) -> None:
    """The error's code is there; a request that was never admitted has no span."""
    full = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with fake_engine(full, fail_at={1}) as (engine, _):
        results = await engine.infer_batch(["x"], max_tokens=2)
        async with engine.infer_stream("a"), engine.infer_stream("b"):
            with pytest.raises(ResourceExhausted):
                await engine.infer("c")
    failed, *cancelled = of_requests(spans)
    assert isinstance(results[0], BackendError)
    assert (dict(failed.attributes or {})["error.type"], failed.status.status_code.name) == ("backend_error", "ERROR")
    assert len(cancelled) == 2
