"""Metrics at an address of the daemon's: of this machine alone, and no client there in anybody's way."""

import math
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from ferrum_rt.daemon.prometheus import MAX_CONNECTIONS, Page, served
from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.ipc.client import connect
from tests.daemon.observing import is_left
from tests.fakes.daemon import forked_daemon

PAGE = Page("text/x", lambda: b"the page")
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
HISTOGRAMS = {
    "gen_ai_server_request_duration_seconds": names.DURATION_BOUNDS,
    "gen_ai_server_time_to_first_token_seconds": names.FIRST_TOKEN_BOUNDS,
    "gen_ai_server_time_per_output_token_seconds": names.PER_TOKEN_BOUNDS,
}


# -- of a daemon ----------------------------------------------------------------------------------------------------------


async def scrape(place: list[str | int] | str) -> dict[str, list[Sample]]:
    """Every sample that is there, by its name."""
    if isinstance(place, str):
        stream: anyio.abc.ByteStream = await anyio.connect_unix(place)
    else:
        stream = await anyio.connect_tcp(str(place[0]), int(place[1]))
    async with stream:
        await stream.send(SCRAPE)
        received = b"".join([part async for part in stream])
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4;")
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def by(samples: list[Sample], label: str) -> dict[str, float]:
    return {sample.labels[label]: sample.value for sample in samples}


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_metrics_are_read_while_requests_run(kind: str, tmp_path: Path) -> None:
    """What runs is there at once, what has ended is in the histograms, with the conventions' buckets; nobody but the
    daemon's user may use its socket, which is gone when it has ended."""
    path = tmp_path / "metrics" / "s"
    address = "127.0.0.1:0" if kind == "tcp" else str(path)
    async with forked_daemon(tmp_path / "s", daemon={"prometheus": address}, step_s=0.001) as daemon:
        [line] = daemon.logged("metrics are served")
        async with connect(tmp_path / "s") as client:
            async with client.infer_stream("left", max_tokens=900) as chunks:
                await anext(chunks)
                during = await scrape(line["address"])
            await client.infer("x", max_tokens=5)
        after = await scrape(line["address"])
        if kind == "unix":
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        daemon.send(signal.SIGTERM)
        assert await daemon.end() == 0
        assert not is_left(path)
    assert by(during["ferrum_requests"], "ferrum_state") == {"running": 1, "waiting": 0, "parked": 0}
    assert sum(by(during["ferrum_requests_ended_total"], "ferrum_outcome").values()) == 0
    assert not set(HISTOGRAMS) & {name.removesuffix("_count") for name in during}
    assert by(after["ferrum_requests_ended_total"], "ferrum_outcome")["finished"] == 1
    for name, bounds in HISTOGRAMS.items():
        buckets = [sample for sample in after[f"{name}_bucket"] if not sample.labels.get("error_type")]
        assert [float(sample.labels["le"]) for sample in buckets] == [*bounds, math.inf], name
        assert buckets[-1].value == 1, name


# -- of anything ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """For a socket. Who uses it ends with the threads and descriptors that it began with."""
    before = len(os.listdir("/proc/self/fd"))
    yield tmp_path / "metrics" / "s"
    assert "ferrum-prometheus" not in {thread.name for thread in threading.enumerate()}
    assert len(os.listdir("/proc/self/fd")) == before


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(path))
    return client


def is_closed(client: socket.socket) -> bool:
    """Or will be."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:  # what it had said was not read
        return True


def ask(path: Path, request: bytes) -> bytes:
    with connected(path) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.1", b"200 OK"),
        (b"GET /metrics?name[]=up HTTP/1.0", b"200 OK"),
        (b"GET / HTTP/1.1", b"404 Not Found"),
        (b"GET /metrics/.. HTTP/1.1", b"404 Not Found"),
        (b"POST /metrics HTTP/1.1", b"405 Method Not Allowed"),
        (b"hello", b"400 Bad Request"),
    ],
)
def test_one_page_is_served(request_line: bytes, status: bytes, place: Path) -> None:
    """To GET alone, as it is when somebody asks."""
    with served(str(place), PAGE):
        answer = ask(place, request_line + b"\r\nAccept: */*\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert answer.endswith(b"\r\nContent-Length: 8\r\nConnection: close\r\n\r\nthe page") == (status == b"200 OK")


def test_clients_that_hang_block_nobody(place: Path) -> None:
    """However many say half of what they have to: who says all of it is answered, the oldest of them are closed, and the end
    waits for none."""
    with ExitStack() as hanging:
        with served(str(place), PAGE):
            clients = [hanging.enter_context(connected(place)) for _ in range(MAX_CONNECTIONS + 5)]
            for client in clients[5:]:
                client.sendall(b"GET /metr")
            for _ in range(3):
                assert ask(place, SCRAPE).endswith(b"the page")
            assert all(is_closed(client) for client in clients[:5])
            began = time.monotonic()
        assert time.monotonic() - began < 0.9
        assert all(is_closed(client) for client in clients)


def test_who_does_not_read_blocks_nobody(place: Path) -> None:
    """Of a page that no socket's buffer holds."""
    with ExitStack() as hanging, served(str(place), Page("text/x", lambda: b"x" * 5_000_000)):
        for _ in range(3):
            hanging.enter_context(connected(place)).sendall(SCRAPE)
        assert len(ask(place, SCRAPE)) > 5_000_000


def test_a_head_without_end_is_not_kept(place: Path) -> None:
    """It is closed without an answer."""
    with served(str(place), PAGE), connected(place) as client:
        with suppress(ConnectionError):  # where it is closed before all of it was read
            client.sendall(b"GET /metrics HTTP/1.1\r\n" + b"x" * 30_000)
            assert client.recv(1) == b""


def test_a_page_that_cannot_be_made_is_an_error_of_ours(place: Path) -> None:
    """For the one who asked; the next is answered."""
    faults = iter([ZeroDivisionError("secret")])

    def render() -> bytes:
        for fault in faults:
            raise fault
        return b"the page"

    with served(str(place), Page("text/x", render)):
        assert ask(place, SCRAPE) == b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\n" + (
            b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
        assert ask(place, SCRAPE).endswith(b"the page")


def test_a_dead_daemons_socket_is_replaced(place: Path) -> None:
    """And a live one's is not."""
    place.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    with served(str(place), PAGE):
        assert ask(place, SCRAPE).endswith(b"the page")
        with pytest.raises(ConfigError, match=rf"^daemon\.prometheus: {place}: another daemon serves it"):
            with served(str(place), PAGE):
                pass
    assert not place.exists()


def test_a_port_that_is_taken_is_named() -> None:
    """With the field that it is in."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"^daemon\.prometheus: {address}: cannot listen there: Address already"):
            with served(address, PAGE):
                pass
