"""What fuzzing has found."""

import os
import socket
from pathlib import Path

import pytest

from ferrum_rt.daemon import session
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Goodbye, Hello, Query, Submit, WireRequest, WireSampling
from tests.daemon.line import Line
from tests.daemon.serving import daemon
from tests.runtime.engines import until

HELLO = encode(Hello(version=1))
LONG = "a" * 256


def ask(request_id: str, client_id: str = "default") -> bytes:
    request = WireRequest(text="x", client_id=client_id, sampling=WireSampling(max_tokens=3))
    return encode(Submit(request_id=request_id, request=request, credit=10))


@pytest.mark.parametrize(("request_id", "client_id"), [(LONG, "default"), ("a", LONG)], ids=["request_id", "client_id"])
async def test_a_name_of_256_characters_is_taken(request_id: str, client_id: str, tmp_path: Path) -> None:
    """docs/protocol.md: names have at most 256 characters, whatever the daemon puts before them for itself."""
    async with daemon(tmp_path) as (_, path):
        line = Line(path)
        line.say(HELLO + ask(request_id, client_id), is_right=True)

        def has_ended() -> bool:
            line.pump()
            return not line.ledger.waiting

        try:
            await until(has_ended)
        finally:
            line.hang_up()


async def test_an_empty_id_ends_the_connection(tmp_path: Path) -> None:
    """``failed`` without a request_id is the connection's last message, so no request can have that id."""
    async with daemon(tmp_path) as (_, path):
        line = Line(path)
        line.say(HELLO + ask(""))

        def has_ended() -> bool:
            line.pump()
            return line.is_over

        try:
            await until(has_ended)
        finally:
            line.hang_up()


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_who_leaves_without_reading_is_not_waited_for(
    says_goodbye: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that says goodbye, or closes its half, and leaves what was written to it unread holds its connection for
    CLOSE_LIMIT_S at most."""
    monkeypatch.setattr(session, "CLOSE_LIMIT_S", 0.05)
    async with daemon(tmp_path) as (_, path):
        before = num_files()
        line = Line(path)
        reports = b"".join(encode(Query(query_id=number, kind="status")) for number in range(2000))
        line.say(HELLO + reports)
        line.flush()
        assert not line.unsent
        await until(lambda: has_come(line))  # the reports are written, and are more than the socket takes
        assert num_files() == before + 2
        if says_goodbye:
            line.say(encode(Goodbye()))
            line.flush()
        else:
            line.half_close()
        try:
            await until(lambda: num_files() == before + 1)
        finally:
            line.hang_up()


def has_come(line: Line) -> bool:
    """Something to read, which stays unread."""
    try:
        return bool(line.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))
