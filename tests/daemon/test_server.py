"""Taking connections in: what the event loop and the kernel may answer."""

import asyncio
import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from ferrum_rt.ipc.messages import Failed, GoingAway
from tests.daemon.serving import server
from tests.daemon.test_session import HELLO, ask, connected
from tests.runtime.engines import text_after, until


async def test_a_connection_that_the_loop_cannot_take_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the event loop has no room for a connection, that one is closed and counted out, and the next is served."""
    loop = asyncio.get_running_loop()

    async def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with server(tmp_path) as (_, path, serving):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "connect_accepted_socket", fail)
            async with connected(path) as unlucky:
                assert await unlucky.hear_all() == []
        assert serving.num_connections == 0
        await until(lambda: not serving._users)
        async with connected(path) as peer:
            await peer.say(HELLO, ask("a", "x"))
            await peer.hear_end_of("a")
            assert peer.text("a") == text_after("x", 10)


async def test_who_has_not_said_hello_when_the_daemon_goes_is_refused(tmp_path: Path) -> None:
    """Its first message is never going_away; who has been welcomed gets just that."""
    async with server(tmp_path) as (_, path, serving), connected(path) as silent, connected(path) as peer:
        await peer.say(HELLO)
        await peer.hear(until_count=1)
        serving.go_away("tidying up", 3.0)
        await peer.hear(until_count=2)
        await silent.hear_all()
    assert peer.heard[1] == GoingAway(reason="tidying up", drain_s=3.0)
    [failed] = silent.heard
    assert isinstance(failed, Failed)
    assert (failed.code, failed.message) == ("cancelled", "tidying up")


async def test_want_of_descriptors_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While no connection can be taken in, the log says so once, and then the connection is taken in after all."""
    attempts = 0
    accept = socket.socket.accept

    def fail_twice(self: socket.socket) -> tuple[socket.socket, Any]:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(self)

    monkeypatch.setattr("ferrum_rt.daemon.server._RETRY_S", 0.01)
    monkeypatch.setattr(socket.socket, "accept", fail_twice)
    async with server(tmp_path) as (_, path, _), connected(path) as peer:
        await peer.say(HELLO, ask("a", "x"))
        await peer.hear_end_of("a")
    assert attempts >= 3
    assert [record.msg for record in caplog.records if record.levelname == "WARNING"] == ["no room for a connection"]
