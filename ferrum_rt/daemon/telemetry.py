"""OpenTelemetry's SDK, set up for a process that is ours: where spans and metrics go."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

import ferrum_rt
from ferrum_rt.daemon.config import DaemonConfig
from ferrum_rt.daemon.logs import StandardError
from ferrum_rt.daemon.prometheus import metrics_page, served
from ferrum_rt.daemon.span_export import CountedSpans, LineExporter, SpanFile
from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import ConfigError

_FLUSH_LIMIT_S = 5.0

_log = logging.getLogger(__name__)


@contextmanager
def exported(config: DaemonConfig, console: StandardError | None) -> Iterator[None]:
    """Record spans and metrics, and have them go where ``config`` says, for as long as the block lasts. ``console`` is our
    standard error, if we have one. Where nothing is configured nothing is recorded.

    Threads of the SDK's do it, which drop what they cannot get rid of; leaving waits for them, but no longer than
    ``_FLUSH_LIMIT_S``, and logs how many spans were lost. Raises ConfigError, naming the field.
    """
    if config.otlp is None and config.spans is None and config.prometheus is None:
        yield
        return
    with ExitStack() as endpoint:
        readers: list[MetricReader] = []
        if config.prometheus is not None:
            reader, page = metrics_page()
            endpoint.enter_context(served(config.prometheus, page))
            readers.append(reader)
        exporters = _span_exporters(config, console)
        if config.otlp is not None:
            readers.append(PeriodicExportingMetricReader(_otlp_metrics(config.otlp)))
        spans = {field: CountedSpans(exporter) for field, exporter in exporters.items()}
        meters = _record(spans, readers)
        try:
            yield
        finally:
            _end(spans, meters, endpoint)


def _span_exporters(config: DaemonConfig, console: StandardError | None) -> dict[str, SpanExporter]:
    """By the field that asks for them."""
    exporters: dict[str, SpanExporter] = {}
    if config.otlp is not None:
        exporters["otlp"] = _otlp_spans(config.otlp)
    if config.spans == "-":
        if console is None:
            raise ConfigError("daemon.spans: there is no standard error to write them to; give the path of a file")
        exporters["spans"] = LineExporter(console.write)
    elif config.spans is not None:
        file = SpanFile(Path(config.spans))
        exporters["spans"] = LineExporter(file.write, file.close)
    return exporters


def _otlp_spans(endpoint: str) -> SpanExporter:
    exporter: SpanExporter = _otlp_module("trace").OTLPSpanExporter(**_sent_to(endpoint, "traces"))
    return exporter


def _otlp_metrics(endpoint: str) -> MetricExporter:
    exporter: MetricExporter = _otlp_module("metric").OTLPMetricExporter(**_sent_to(endpoint, "metrics"))
    return exporter


def _otlp_module(kind: str) -> Any:
    try:
        return import_module(f"opentelemetry.exporter.otlp.proto.http.{kind}_exporter")
    except ImportError as error:
        raise ConfigError("daemon.otlp: the exporter is not installed; pip install 'ferrum-rt[otlp]'") from error


def _sent_to(endpoint: str, signal: str) -> dict[str, Any]:
    return {"endpoint": f"{endpoint.rstrip('/')}/v1/{signal}", "timeout": _FLUSH_LIMIT_S}


def _record(spans: Mapping[str, CountedSpans], readers: Sequence[MetricReader]) -> MeterProvider:
    """The SDK becomes the process's, for whatever of it somebody wants."""
    resource = Resource.create({"service.name": "ferrum-rt", "service.version": ferrum_rt.__version__})
    if spans:
        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        for each in spans.values():
            tracers.add_span_processor(each)
        trace.set_tracer_provider(tracers)
    meters = MeterProvider(readers, resource=resource, shutdown_on_exit=False)
    if readers:
        metrics.set_meter_provider(meters)

    def dropped(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(each.num_dropped, {names.EXPORTER: field}) for field, each in spans.items()]

    meters.get_meter(names.SCOPE).create_observable_counter(
        names.SPANS_DROPPED, [dropped], unit="{span}", description="Spans that could not be exported."
    )
    return meters


# -- the end --------------------------------------------------------------------------------------------------------------


def _end(spans: Mapping[str, CountedSpans], meters: MeterProvider, endpoint: ExitStack) -> None:
    """Each waits for its own reader or server, so each has a thread to wait in. Metrics go last, for they tell of the spans;
    but not so late that spans which hang leave them no time."""
    deadline = time.monotonic() + _FLUSH_LIMIT_S
    ending = [_begun(end) for end in (endpoint.close, *(each.shutdown for each in spans.values()))]
    _wait_for(ending, deadline - _FLUSH_LIMIT_S / 2)
    ending.append(_begun(meters.shutdown))
    _wait_for(ending, deadline)
    if lost := {field: each.num_lost for field, each in spans.items() if each.num_lost}:
        _log.warning("spans were dropped", extra={"dropped": lost})


def _begun(end: Callable[[], object]) -> Thread:
    def run() -> None:
        try:
            end()
        except Exception as fault:
            _log.warning("telemetry did not end well", exc_info=fault)

    thread = Thread(target=run, name="ferrum-telemetry-end", daemon=True)
    thread.start()
    return thread


def _wait_for(threads: Iterable[Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
