"""OpenTelemetry's SDK, set up for a process that is ours: where the spans of requests go."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

import ferrum_rt
from ferrum_rt.interfaces.errors import ConfigError

_FLUSH_LIMIT_S = 5.0


@contextmanager
def exported(endpoint: str | None) -> Iterator[None]:
    """Send spans by OTLP over HTTP to ``endpoint``, as ``http://localhost:4318``, from a thread of the SDK's, which drops
    what it cannot send; leaving waits for it, but no longer than ``_FLUSH_LIMIT_S``. None: make no spans. Raises
    ConfigError where the exporter is not installed."""
    if endpoint is None:
        yield
        return
    try:
        module = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigError("daemon.otlp: the exporter is not installed; pip install 'ferrum-rt[otlp]'") from error
    exporter = module.OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_FLUSH_LIMIT_S)
    resource = Resource.create({"service.name": "ferrum-rt", "service.version": ferrum_rt.__version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # The SDK waits for each batch in turn, up to 30 s in all; what has not left by then is lost.
        flushing = Thread(target=provider.shutdown, name="ferrum-spans", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_LIMIT_S)
