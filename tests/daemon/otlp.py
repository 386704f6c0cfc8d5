"""A collector: it receives OTLP over HTTP, and is made of the official messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """What it was sent, and where it listens. ``status`` is what it answers."""

    def __init__(self, status: int) -> None:
        self.status, self.endpoint = status, ""
        self.spans: list[Span] = []
        self.metrics: dict[str, Metric] = {}
        """By name, as they came last."""

    def receive(self, path: str, body: bytes) -> None:
        match path:
            case "/v1/traces":
                for traced in ExportTraceServiceRequest.FromString(body).resource_spans:
                    self.spans += [span for scope in traced.scope_spans for span in scope.spans]
            case "/v1/metrics":
                for measured in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                    self.metrics |= {metric.name: metric for scope in measured.scope_metrics for metric in scope.metrics}


@contextmanager
def collector(status: int = 200) -> Iterator[Collector]:
    """On a port of its own, while the block lasts."""
    found = Collector(status)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.receive(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(found.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        found.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
