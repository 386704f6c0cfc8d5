"""What a client does with the daemon at a path, to be cancelled at each await of it."""

import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import anyio

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.server import Server
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.types import SessionId
from ferrum_rt.ipc.client import Client, connect
from ferrum_rt.ipc.connection import Connection
from tests.faults.scenarios import CountingRuntime, Scenario
from tests.ipc.test_client_greeting import GREETING
from tests.runtime.engines import text_after

WAIT_S = 0.004
MUCH = "x" * 1_000_000
CREDIT = 4  # less than usual, which the tests see to
_ENOUGH = CREDIT // 2 + 2  # to give credit once


@asynccontextmanager
async def counted_daemon(path: Path) -> AsyncIterator[CountingRuntime]:
    """The real server in this process, over an engine that counts."""
    config = build_config(None, None, {"kv_cache": {"prefix_caching": False}})
    with _listening(path) as listener:
        async with CountingRuntime(config, step_s=0.0002) as engine:
            assert isinstance(engine, CountingRuntime)
            server = Server(engine, allowed_uids=[_uid(listener)], limits=DaemonLimits())
            async with anyio.create_task_group() as tasks:
                await tasks.start(server.run, [listener])
                yield engine
                tasks.cancel_scope.cancel()


def _uid(listener: socket.socket) -> int:
    return Path(listener.getsockname()).stat().st_uid


@contextmanager
def _listening(path: Path, backlog: int = 100) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        listener.setblocking(False)
        yield listener


# -- with a daemon that answers -------------------------------------------------------------------------------------------


async def _infer(path: Path) -> None:
    async with connect(path) as client:
        assert (await client.infer("hello", max_tokens=4)).text == text_after("hello", 4)


async def _stream(path: Path) -> None:
    async with connect(path) as client:
        async with client.infer_stream("hello", max_tokens=_ENOUGH) as chunks:
            assert "".join([chunk.text async for chunk in chunks]) == text_after("hello", _ENOUGH)


async def _batch(path: Path) -> None:
    async with connect(path) as client:
        results = await client.infer_batch(["a", "b", "c"], max_tokens=2)
        assert [getattr(result, "text", None) for result in results] == [text_after(text, 2) for text in "abc"]


async def _reports(path: Path) -> None:
    async with connect(path) as client:
        await client.status()
        assert (await client.health_check()).healthy
        await client.fetch_arrivals()
        await client.fetch_diagnostics()
        client.metrics()


async def _sessions(path: Path) -> None:
    async with connect(path) as client:
        await client.infer("hello", max_tokens=4, session_id=SessionId("s"))
        await client.end_session(SessionId("t"))  # of a run that was cancelled
        await client.fork_session(SessionId("s"), SessionId("t"))
        assert await client.end_session(SessionId("s"))
        assert await client.end_session(SessionId("t"))


async def _close_while_busy(path: Path) -> None:
    async with connect(path) as client:
        async with client.infer_stream("hello", max_tokens=900) as chunks:
            await anext(aiter(chunks))
            await client.shutdown()


# -- with one that does not -----------------------------------------------------------------------------------------------


async def _deaf(path: Path) -> None:
    """It greets and reads nothing more, so what is sent does not leave."""
    with tempfile.TemporaryDirectory() as directory, _listening(Path(directory) / "s") as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_greet, listener)
            async with connect(Path(directory) / "s") as client:
                async with client.infer_stream(MUCH):
                    await _in_vain(client)
            tasks.cancel_scope.cancel()


async def _greet(listener: socket.socket) -> None:
    await anyio.wait_readable(listener)
    connection, _ = listener.accept()
    with connection:
        connection.sendall(GREETING)
        await anyio.sleep_forever()


async def _in_vain(client: Client) -> None:
    with anyio.move_on_after(WAIT_S):
        await client.status()
    with anyio.move_on_after(WAIT_S):
        await client.infer("x")
    with anyio.move_on_after(WAIT_S):
        async with client.infer_stream("x"):
            pass


async def _full(path: Path) -> None:
    """As many wait to be taken in as may; and one of them sends more than its socket takes."""
    with tempfile.TemporaryDirectory() as directory, _listening(Path(directory) / "s", backlog=0) as listener:
        with closing(Connection(Path(listener.getsockname()))) as first:
            await first.open()
            with anyio.move_on_after(WAIT_S):
                await first.send(MUCH.encode())
            with anyio.move_on_after(0.015):
                async with connect(Path(listener.getsockname())):
                    raise AssertionError("there was room")


CLIENTS = [
    Scenario("client: infer", _infer),
    Scenario("client: stream", _stream),
    Scenario("client: batch", _batch),
    Scenario("client: reports", _reports),
    Scenario("client: sessions", _sessions),
    Scenario("client: close while busy", _close_while_busy),
    Scenario("client: a daemon that does not read", _deaf),
    Scenario("client: a daemon that takes nobody in", _full),
]
