"""Spans of this process, for a test."""

import pytest
from opentelemetry.sdk.trace import TracerProvider

from ferrum_rt.load import driver
from ferrum_rt.load.spans import SpanRecorder
from ferrum_rt.runtime import step_trace, tracing


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SpanRecorder:
    """All spans of a load and of the engine are recorded here; the process's own provider is left alone."""
    recorder, provider = SpanRecorder(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(recorder)
    for module in (driver, tracing, step_trace):
        monkeypatch.setattr(module, "_TRACER", provider.get_tracer("test"))
    return recorder
