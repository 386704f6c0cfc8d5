"""Exporters of spans that are down, hang or raise: no request is any different, and no end waits long."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ferrum_rt.runtime import tracing
from tests.fakes.daemon import ROOT
from tests.runtime.engines import fake_engine, text_after


class Hanging(SpanExporter):
    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.reached.set()
        self.released.wait(10)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.released.set()


class Raising(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        raise ZeroDivisionError


class RaisingAtStart(SpanProcessor):
    def on_start(self, span: object, parent_context: object = None) -> None:
        raise ZeroDivisionError


class RaisingAtEnd(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        raise ZeroDivisionError


@pytest.fixture(params=["refuses", "hangs", "raises", "raises at the start", "raises at the end"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpanProcessor]:
    """What the spans of this test go to."""
    exporter: SpanExporter
    hanging = Hanging()
    match request.param:
        case "raises at the start":
            processor: SpanProcessor = RaisingAtStart()
        case "raises at the end":
            processor = RaisingAtEnd()
        case kind:
            with socket.create_server(("127.0.0.1", 0)) as closed_soon:
                endpoint = f"http://127.0.0.1:{closed_soon.getsockname()[1]}"
            exporter = {"refuses": OTLPSpanExporter(endpoint, timeout=0.1), "hangs": hanging}.get(kind, Raising())
            processor = BatchSpanProcessor(exporter, schedule_delay_millis=1)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))
    yield processor
    hanging.released.set()
    provider.shutdown()


async def test_an_exporter_that_fails_is_no_requests_trouble(processor: SpanProcessor) -> None:
    """Texts are right, every request has its one end, and closing the engine does not wait for the exporter."""
    async with fake_engine() as (engine, _):
        for number in range(5):
            assert (await engine.infer(f"{number}", max_tokens=4)).text == text_after(f"{number}", 4)
        async with engine.infer_stream("left", max_tokens=900):
            pass
        counts = (await engine.status()).requests
        assert (counts.finished, counts.cancelled, counts.failed) == (5, 1, 0)
        began = time.monotonic()
    assert time.monotonic() - began < 2.0


@pytest.mark.slow
def test_a_collector_that_hangs_delays_the_daemons_end_by_its_limit_and_no_more() -> None:
    """However many batches wait for a collector that never answers, flushing ends after ``_FLUSH_LIMIT_S``."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        code = f"""
import time
from opentelemetry import trace
from ferrum_rt.daemon import telemetry
telemetry._FLUSH_LIMIT_S = 0.5
with telemetry.exported("http://127.0.0.1:{deaf.getsockname()[1]}"):
    for _ in range(2000):
        trace.get_tracer("x").start_span("a").end()
    began = time.monotonic()
print(time.monotonic() - began)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert 0.4 < float(done.stdout) < 1.5
