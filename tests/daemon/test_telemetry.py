"""The daemon's spans, read back from a receiver of OTLP."""

import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ferrum_rt.daemon.telemetry import exported
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.ipc.client import connect
from tests.fakes.daemon import daemon_process

PARENT = trace.NonRecordingSpan(
    trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
)


class Receiver(BaseHTTPRequestHandler):
    received: ClassVar[list[ExportTraceServiceRequest]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Where it listens, and what it has received."""
    Receiver.received = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Receiver.received
        server.shutdown()
        thread.join()


@pytest.mark.slow
async def test_a_clients_trace_goes_on_in_the_daemon(
    tmp_path: Path, receiver: tuple[str, list[ExportTraceServiceRequest]]
) -> None:
    """With an endpoint configured, the span of a client's request arrives there, in the client's trace, when the daemon has
    ended at the latest."""
    endpoint, received = receiver
    file, path = tmp_path / "serve.toml", tmp_path / "s.sock"
    file.write_text(f'[daemon]\notlp = "{endpoint}"\n')
    async with daemon_process(path, config_file=str(file)) as process:
        async with connect(path) as client:
            with trace.use_span(PARENT):
                await client.infer("x", max_tokens=3)
        process.terminate()
        await anyio.to_thread.run_sync(process.wait)
    [span] = [span for request in received for r in request.resource_spans for s in r.scope_spans for span in s.spans]
    assert (span.name, span.trace_id, span.parent_span_id) == (
        "text_completion fake",
        (0xABC).to_bytes(16, "big"),
        (0xDEF).to_bytes(8, "big"),
    )


def test_a_missing_exporter_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who configures an endpoint without the package for it is told what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="otlp"):
        with exported("http://localhost:4318"):
            pass
