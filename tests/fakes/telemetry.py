"""The runtime's tracing and metrics with an SDK of the test's own: the process's providers can be set only once."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from unittest.mock import patch

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.runtime import runtime, step_trace, tracing


@contextmanager
def traced_by(provider: TracerProvider) -> Iterator[None]:
    """Requests and steps have their spans from it."""
    tracer = provider.get_tracer(names.SCOPE)
    with patch.object(tracing, "_TRACER", tracer), patch.object(step_trace, "_TRACER", tracer):
        yield


@contextmanager
def measured_by(instruments: ModuleType) -> Iterator[None]:
    """Requests are recorded with these, and engines opened meanwhile are read by them."""
    with patch.object(runtime, "record", instruments.record), patch.object(runtime, "watch", instruments.watch):
        yield


def instruments_of(provider: MeterProvider) -> ModuleType:
    """A copy of ``ferrum_rt.runtime.instruments`` that belongs to ``provider``."""
    spec = find_spec("ferrum_rt.runtime.instruments")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with patch.object(metrics, "get_meter", provider.get_meter):
        spec.loader.exec_module(module)
    return module
