"""What clients leave behind that read slowly, not at all, or die: nothing."""

import asyncio
import os
import random
import socket
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.server import Server
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import ClientMessage, Finished, Query
from ferrum_rt.runtime.runtime import Runtime
from tests.daemon.serving import server
from tests.daemon.test_session import HELLO, ask, connected
from tests.runtime.engines import text_after, until

NUM_STREAMS = 4
TOKENS = 60
CONFIG = {"scheduler": {"max_running_requests": 16}, "kv_cache": {"num_pages": 96}}


def machine() -> dict[str, Any]:
    """What a process has of the machine, and an event loop of tasks."""
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def silent(path: Path, *, credit: int, num_queries: int = 0) -> socket.socket:
    """A connection with streams that nobody reads."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    requests = (ask(f"{name}", f"silent {name}", max_tokens=500, credit=credit) for name in range(NUM_STREAMS))
    queries = (Query(query_id=number, kind="health") for number in range(num_queries))
    messages: list[ClientMessage] = [HELLO, *requests, *queries]
    connection.sendall(b"".join(map(encode, messages)))
    return connection


async def die(connection: socket.socket, *, after: int) -> None:
    """Hang up, half of a message having been said, with whatever has not been read."""
    for _ in range(after):
        await anyio.lowlevel.checkpoint()
    connection.send(encode(ask("half", "x"))[:20])
    connection.close()


async def read_all(path: Path, name: str) -> str:
    async with connected(path) as peer:
        await peer.say(HELLO, ask(name, name, max_tokens=TOKENS))
        await peer.hear_end_of(name)
        assert sum(isinstance(message, Finished) for message in peer.heard) == 1
        return peer.text(name)


def is_empty(engine: Runtime, serving: Server) -> bool:
    return not serving.num_connections and not engine.status_now().requests.running


@pytest.mark.slow
async def test_slow_and_dying_clients_leave_nothing(tmp_path: Path) -> None:
    """Beside connections that read nothing, that give no credit, and that die at any moment, the others get what they asked
    for; when all have gone, tasks, threads, descriptors, pages, sessions and users are what they were before."""
    rng = random.Random(0)
    async with server(tmp_path, config=CONFIG) as (engine, path, serving):
        await read_all(path, "first")
        await until(lambda: is_empty(engine, serving))
        before = machine()
        unread = [silent(path, credit=1_000_000, num_queries=300) for _ in range(4)]
        unpaid = [silent(path, credit=2) for _ in range(4)]
        texts = dict[str, str]()

        async def read(name: str) -> None:
            texts[name] = await read_all(path, name)

        async with anyio.create_task_group() as tasks:
            for number in range(12):
                tasks.start_soon(read, f"healthy {number}")
                tasks.start_soon(lambda: die(silent(path, credit=rng.choice((2, 1000))), after=rng.randrange(200)))
        assert texts == {f"healthy {number}": text_after(f"healthy {number}", TOKENS) for number in range(12)}
        assert serving.num_connections == len(unread) + len(unpaid)
        for connection in (*unread, *unpaid):
            connection.close()
        await until(lambda: is_empty(engine, serving))
        assert machine() == before
        assert engine.status_now().pages.active == 0
        assert not serving._sessions
        assert not serving._users


async def test_who_does_not_read_is_cut_off_and_leaves_nothing(tmp_path: Path) -> None:
    """A connection that is cut off while it does not read is gone, with its streams, although it never hangs up."""
    limits = DaemonLimits(connection_output_bytes=20_000)
    async with server(tmp_path, limits=limits, config=CONFIG) as (engine, path, serving):
        before = machine()
        unread = silent(path, credit=1_000_000, num_queries=2000)
        await until(lambda: not engine.status_now().requests.running and engine.status_now().requests.cancelled > 0)
        unread.recv(1 << 20)
        unread.close()
        await until(lambda: is_empty(engine, serving))
        assert machine() == before
        assert not serving._users
