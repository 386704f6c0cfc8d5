"""Exporters of spans and readers of metrics that are down, hang or raise: no request is any different, no end waits long,
and what is lost is counted."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from ferrum_rt.daemon.span_export import CountedSpans
from ferrum_rt.load.spans import SpanRecorder
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.daemon import ROOT
from tests.fakes.telemetry import instruments_of, measured_by, traced_by
from tests.runtime.engines import fake_engine, text_after

Answer = Callable[[], None]
"""Called by an exporter instead of exporting: it raises, or waits."""


class Hang:
    """``reached`` when somebody hangs in it, until ``released``."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.released.wait(30)


def fault() -> None:
    raise ZeroDivisionError


class SpanFault(SpanExporter):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def export(self, spans: object) -> SpanExportResult:
        self._answer()
        return SpanExportResult.FAILURE


class MetricFault(MetricExporter):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def export(self, metrics_data: object, timeout_millis: float = 0, **_: Any) -> MetricExportResult:
        self._answer()
        return MetricExportResult.FAILURE

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **_: Any) -> None:
        pass


class RaisingAtStart(SpanProcessor):
    def on_start(self, span: object, parent_context: object = None) -> None:
        raise ZeroDivisionError


class RaisingAtEnd(SpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        raise ZeroDivisionError


@pytest.fixture
def hang() -> Iterator[Hang]:
    hang = Hang()
    yield hang
    hang.released.set()


@pytest.fixture
def nowhere() -> str:
    """A URL at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        return f"http://127.0.0.1:{closed_soon.getsockname()[1]}"


@pytest.fixture
def span_exporter(request: pytest.FixtureRequest, hang: Hang, nowhere: str) -> SpanExporter:
    match request.param:
        case "refuses":
            return OTLPSpanExporter(nowhere, timeout=0.1)
        case "hangs":
            return SpanFault(hang)
        case _:
            return SpanFault(fault)


ALL_KINDS = pytest.mark.parametrize("span_exporter", ["refuses", "hangs", "raises"], indirect=True)


@pytest.fixture
def provider(hang: Hang) -> Iterator[TracerProvider]:
    """That of the runtime's spans, in this test. It is shut down when nothing hangs any more."""
    provider = TracerProvider(shutdown_on_exit=False)
    with traced_by(provider):
        yield provider
    hang.released.set()
    provider.shutdown()


async def answers_as_ever(engine: Runtime) -> None:
    """Texts are right, and every request has its one end."""
    for number in range(5):
        assert (await engine.infer(f"{number}", max_tokens=4)).text == text_after(f"{number}", 4)
    async with engine.infer_stream("left", max_tokens=900):
        pass
    counts = (await engine.status()).requests
    assert (counts.finished, counts.cancelled, counts.failed) == (5, 1, 0)


async def lives_as_ever() -> None:
    """And closing the engine does not wait for anybody."""
    async with fake_engine() as (engine, _):
        await answers_as_ever(engine)
        began = time.monotonic()
    assert time.monotonic() - began < 2.0


# -- spans ----------------------------------------------------------------------------------------------------------------


@ALL_KINDS
async def test_an_exporter_that_fails_is_no_requests_trouble(
    span_exporter: SpanExporter, provider: TracerProvider, hang: Hang
) -> None:
    """And every span is counted as lost: at once those whose export has failed, in the end those that wait, too."""
    spans, recorder = CountedSpans(span_exporter, every_s=0.001), SpanRecorder()
    provider.add_span_processor(recorder)
    provider.add_span_processor(spans)
    await lives_as_ever()
    num_ended = len(recorder.take())
    assert num_ended >= 5 * 4
    assert spans.num_lost == num_ended
    hang.released.set()
    spans.shutdown()
    assert (spans.num_dropped, spans.num_lost) == (num_ended, num_ended)


@pytest.mark.parametrize("processor", [RaisingAtStart, RaisingAtEnd])
async def test_a_processor_that_raises_is_no_requests_trouble(
    processor: type[SpanProcessor], provider: TracerProvider
) -> None:
    """Whichever end of a span it raises at."""
    provider.add_span_processor(processor())
    await lives_as_ever()


# -- metrics --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["refuses", "hangs", "raises", "a callback hangs", "a callback raises"])
def instruments(request: pytest.FixtureRequest, hang: Hang, nowhere: str) -> Iterator[ModuleType]:
    """The runtime's, which are read every millisecond, and that comes to nothing."""
    answers: dict[str, Answer] = {"hangs": hang, "raises": fault}
    answer = answers.get(request.param, lambda: None)
    exporter = OTLPMetricExporter(nowhere, timeout=0.1) if request.param == "refuses" else MetricFault(answer)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=1, export_timeout_millis=1e5)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    instruments = instruments_of(provider)

    def observe(_: CallbackOptions) -> Iterable[Observation]:
        (hang if request.param == "a callback hangs" else fault)()
        return ()

    if request.param.startswith("a callback"):
        provider.get_meter("of another library").create_observable_gauge("x", [observe])
    yield instruments
    hang.released.set()
    provider.shutdown()


async def test_a_reader_of_metrics_that_fails_is_no_requests_trouble(instruments: ModuleType) -> None:
    """Nor one that hangs while it reads."""
    with measured_by(instruments):
        await lives_as_ever()


# -- the daemon's end -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_collector_that_hangs_delays_the_daemons_end_by_its_limit_and_no_more() -> None:
    """However many batches wait for a collector that never answers, flushing ends after ``_FLUSH_LIMIT_S``, and tells how
    many spans were lost."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        code = f"""
import json, logging, time
from opentelemetry import trace
from ferrum_rt.daemon import telemetry
from ferrum_rt.daemon.config import DaemonConfig
class Kept(logging.Handler):
    def emit(self, record):
        kept.append(record)
kept = []
logging.getLogger("ferrum_rt").addHandler(Kept())
telemetry._FLUSH_LIMIT_S = 0.5
with telemetry.exported(DaemonConfig(otlp="http://127.0.0.1:{deaf.getsockname()[1]}"), None):
    for _ in range(2000):
        trace.get_tracer("x").start_span("a").end()
    began = time.monotonic()
print(json.dumps([time.monotonic() - began, [record.dropped for record in kept]]))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    took_s, dropped = json.loads(done.stdout)
    assert 0.4 < took_s < 1.5
    assert dropped == [{"otlp": 2000}]
