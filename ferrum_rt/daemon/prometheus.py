"""GET /metrics for Prometheus, and nothing else, from a thread with an event loop of its own."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from threading import Thread
from typing import NamedTuple

from opentelemetry.sdk.metrics.export import MetricReader

from ferrum_rt.daemon.config import loopback_address
from ferrum_rt.daemon.socket_file import claim
from ferrum_rt.interfaces.errors import ConfigError

MAX_CONNECTIONS = 32
_MAX_HEAD_BYTES = 8192
_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
_LIMIT_S = 10.0
_END_LIMIT_S = 1.0

_log = logging.getLogger(__name__)


class Page(NamedTuple):
    """What is at /metrics: it is made anew whenever somebody asks."""

    content_type: str
    render: Callable[[], bytes]


def metrics_page() -> tuple[MetricReader, Page]:
    """A reader for the SDK, and the page that has what it reads. Raises ConfigError where the exporter is not installed."""
    try:
        client, exporter = import_module("prometheus_client"), import_module("opentelemetry.exporter.prometheus")
    except ImportError as error:
        raise ConfigError("daemon.prometheus: the exporter is not installed; pip install 'ferrum-rt[prometheus]'") from error
    registry = client.CollectorRegistry()  # the package's own would have its metrics of the process, too
    reader: MetricReader = exporter.PrometheusMetricReader(scope_info_enabled=False, registry=registry)
    return reader, Page(_TEXT_FORMAT, partial(client.generate_latest, registry))


@contextmanager
def served(address: str, page: Page) -> Iterator[None]:
    """The page is on ``address`` for as long as the block lasts: a loopback address and a port (0: any), or the path of a
    socket, which is claimed as the daemon's own is. Raises ConfigError where nobody can listen there."""
    with _listening(address) as listener:
        _log.info("metrics are served", extra={"address": listener.getsockname()})
        loop, told_to_end = asyncio.SelectorEventLoop(), asyncio.Event()
        endpoint = _Endpoint(page)

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(endpoint.serve(listener, told_to_end))

        thread = Thread(target=run, name="ferrum-prometheus", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with suppress(RuntimeError):  # the loop is closed: the thread has met its end before
                loop.call_soon_threadsafe(told_to_end.set)
            thread.join(_END_LIMIT_S)


@contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    place = loopback_address(address)
    with ExitStack() as stack:
        try:
            if place is None:
                listener = stack.enter_context(claim(address)).listener
            else:
                family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
                listener = stack.enter_context(socket.create_server(place, family=family))
        except ConfigError as error:
            raise ConfigError(f"daemon.prometheus: {error}") from error
        except OSError as error:
            raise ConfigError(f"daemon.prometheus: {address}: cannot listen there: {error.strerror}") from error
        yield listener


class _Endpoint:
    """On the loop of the thread. ``_open`` are the connections, the oldest first, and the tasks that answer them."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._open: dict[asyncio.WriteTransport, asyncio.Task[None]] = {}

    async def serve(self, listener: socket.socket, told_to_end: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connected, sock=listener, limit=_MAX_HEAD_BYTES)
        await told_to_end.wait()
        server.close()
        answering = list(self._open.values())
        for transport in self._open:
            transport.abort()
        if answering:
            await asyncio.wait(answering)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            # Whoever scrapes is done in milliseconds, so this is one that hangs, or one of a flood.
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.abort()
        task = asyncio.current_task()
        assert task is not None
        self._open[writer.transport] = task
        try:
            async with asyncio.timeout(_LIMIT_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # it went away, hangs, or says something else than HTTP
        finally:
            self._open.pop(writer.transport, None)
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        match head.split(b"\r\n", 1)[0].split(b" "):
            case [b"GET", target, _] if target.split(b"?")[0] == b"/metrics":
                try:
                    return _response("200 OK", self._page.render(), self._page.content_type)
                except Exception as fault:
                    _log.warning("the metrics could not be read", exc_info=fault)
                    return _response("500 Internal Server Error")
            case [b"GET", _, _]:
                return _response("404 Not Found", b"Metrics are at /metrics.\n")
            case [_, _, _]:
                return _response("405 Method Not Allowed", b"Only GET is answered.\n")
        return _response("400 Bad Request")


def _response(status: str, body: bytes = b"", content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
