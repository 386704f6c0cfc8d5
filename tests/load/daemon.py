"""tests.fakes.daemon that writes its spans to a file: ``python -m tests.load.daemon FILE SOCKET OPTIONS``."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio.from_thread
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

from tests.fakes.daemon import _main, started


@contextmanager
def tracing_daemon(spans: Path, path: Path, **options: Any) -> Iterator[None]:
    """It serves ``path`` in the block, for tests that are not async."""
    command = [sys.executable, "-m", "tests.load.daemon", str(spans), str(path), json.dumps(options)]
    with anyio.from_thread.start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(started(command)):
            yield


def _line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


if __name__ == "__main__":
    spans, path, options = sys.argv[1:]
    with open(spans, "a") as file:
        provider = TracerProvider(shutdown_on_exit=False)
        exporter = ConsoleSpanExporter(out=file, formatter=_line)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=300))
        trace.set_tracer_provider(provider)
        sys.exit(_main(path, json.loads(options)))
