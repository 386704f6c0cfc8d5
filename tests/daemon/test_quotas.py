"""What one user may have, whatever it asks for, and that it takes nothing from another. Only root can be two users."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.abc
import pytest

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Cancel, Failed, Finished, Query, Welcome
from tests.daemon.attacks import connect_as
from tests.daemon.serving import server
from tests.daemon.test_hardening import FOREVER, raw_client
from tests.daemon.test_session import HELLO, Peer, ask, connected
from tests.fakes.daemon import daemon_process
from tests.fakes.executor import ByteTokenizer
from tests.runtime.engines import text_after, until

NOBODY = 65534
US = os.getuid()
as_root = pytest.mark.skipif(US != 0, reason="only root can be another user")


@asynccontextmanager
async def connected_as(path: Path, uid: int) -> AsyncIterator[Peer]:
    client = socket.socket(socket.AF_UNIX)
    connect_as(client, path, uid)
    async with await anyio.abc.UNIXSocketStream.from_socket(client) as stream:
        yield Peer(stream)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user can enter."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


async def is_served(peer: Peer, request_id: str) -> None:
    await peer.say(ask(request_id, "other"))
    await peer.hear_end_of(request_id)
    assert peer.text(request_id) == text_after("other", 10)


def refusals(peer: Peer) -> list[str]:
    return [
        message.message for message in peer.heard if isinstance(message, Failed) and message.code == "resource_exhausted"
    ]


# -- who may come in ------------------------------------------------------------------------------------------------------

# The frame that it sends first announces 2 GiB; were it looked at, that would be the complaint.
OTHER_USER = f"""
import os, socket, sys
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
client = socket.socket(socket.AF_UNIX)
code = client.connect_ex(sys.argv[1])
if code:
    sys.exit(os.strerror(code))
try:
    client.sendall(bytes.fromhex(sys.argv[2]))
except OSError:
    pass
sys.stdout.buffer.write(client.recv(1 << 20))
"""


def as_another_user(path: Path, said: bytes) -> bytes:
    """What a process of another user hears first, or why it cannot connect."""
    command = [sys.executable, "-c", OTHER_USER, str(path), said.hex()]
    done = subprocess.run(command, capture_output=True, timeout=20)
    return done.stdout or done.stderr


@as_root
@pytest.mark.slow
async def test_another_user_comes_in_only_if_it_is_named(open_directory: Path) -> None:
    """The modes that the daemon sets keep it out; where they are opened the daemon refuses it, whatever it sends; and
    ``allowed_uids`` lets it in."""
    path = open_directory / "run" / "s"
    announced = (2**31 - 1).to_bytes(4, "little")
    async with daemon_process(path):
        assert b"Permission denied" in as_another_user(path, announced)
        path.parent.chmod(0o755)
        assert b"Permission denied" in as_another_user(path, announced)
        path.chmod(0o666)
        assert b"permission_denied" in as_another_user(path, announced)
    file = open_directory / "config.toml"
    file.write_text(f"[daemon]\nallowed_uids = [{NOBODY}]\n")
    async with daemon_process(path, config_file=str(file)):
        path.parent.chmod(0o755)
        path.chmod(0o666)
        assert b"welcome" in as_another_user(path, encode(HELLO))
        assert b"2147483647" in as_another_user(path, announced)


# -- what it may have -----------------------------------------------------------------------------------------------------


@as_root
@pytest.mark.parametrize(
    ("limits", "text", "reason"),
    [
        (DaemonLimits(user_requests=3), "x", "requests"),
        (DaemonLimits(user_tokens=3 * 5200), "x", "tokens"),
        (DaemonLimits(user_bytes=3 * 2100), "x" * 2000, "bytes"),
    ],
    ids=["requests", "tokens", "bytes"],
)
async def test_a_user_that_has_all_it_may_have_takes_nothing_from_another(
    open_directory: Path, limits: DaemonLimits, text: str, reason: str
) -> None:
    """The fourth request is refused, on whichever of the user's connections it comes, while another user is served all the
    time; when one of the first three ends, there is room for another."""
    config = {"model": {"max_model_len": 10_000}}
    async with AsyncExitStack() as stack:
        _, path, _ = await stack.enter_async_context(server(open_directory, limits=limits, uids=(US, NOBODY), config=config))
        path.chmod(0o666)
        greedy = [await stack.enter_async_context(connected_as(path, NOBODY)) for _ in range(4)]
        other = await stack.enter_async_context(connected(path))
        await other.say(HELLO)
        for number, peer in enumerate(greedy[:3]):
            await peer.say(HELLO, ask("a", text, max_tokens=5000, credit=1))
            await peer.hear(until_count=2)
            await is_served(other, f"{number}")
        last = greedy[3]
        await last.say(HELLO, ask("b", text, max_tokens=5000, credit=1))
        await last.hear_end_of("b")
        assert [f" {reason} under way" in message for message in refusals(last)] == [True]
        await is_served(other, "beside")
        await greedy[0].say(Cancel(request_id="a"))
        await greedy[0].hear_end_of("a")
        await last.say(ask("c", text, max_tokens=50))
        await last.hear_end_of("c")
        assert len(last.text("c")) == 50


@as_root
async def test_a_user_that_has_all_its_connections_keeps_nobody_out(open_directory: Path) -> None:
    """One more of its own is refused with a reason; another user's is taken; and when one is closed there is room again."""
    async with AsyncExitStack() as stack:
        limits = DaemonLimits(user_connections=3)
        _, path, serving = await stack.enter_async_context(server(open_directory, limits=limits, uids=(US, NOBODY)))
        path.chmod(0o666)
        greedy = [await stack.enter_async_context(connected_as(path, NOBODY)) for _ in range(4)]
        await greedy[3].hear_all()
        assert refusals(greedy[3]) == [f"uid {NOBODY} has 3 connections open, which is all that it may"]
        async with connected(path) as other:
            await other.say(HELLO)
            await is_served(other, "a")
        await greedy[0].hang_up()
        await until(lambda: serving.num_connections == 2)
        async with connected_as(path, NOBODY) as again:
            await again.say(HELLO)
            assert isinstance((await again.hear(until_count=1))[0], Welcome)


class Gate:
    """What the tokenizer's thread waits for at each text; ``is_reached`` once it does."""

    def __init__(self) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.is_reached.set()
        assert self.is_open.wait(10)


@pytest.fixture
def tokenizer_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, encode_batch = Gate(), ByteTokenizer.encode_batch

    def wait_first(self: ByteTokenizer, texts: Any, **options: Any) -> list[list[TokenId]]:
        gate.pass_through()
        return encode_batch(self, texts, **options)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", wait_first)
    yield gate
    gate.is_open.set()


async def test_cancelled_requests_count_until_the_tokenizer_has_let_go_of_them(tmp_path: Path, tokenizer_gate: Gate) -> None:
    """Who cancels as fast as it submits cannot queue more than it may have, on however many connections; when the tokenizer
    has come to what was cancelled, the user has room again."""
    limits = DaemonLimits(user_requests=8)
    async with server(tmp_path, limits=limits) as (engine, path, serving), connected(path) as peer:
        await peer.say(HELLO, ask("first", "x"))
        await until(tokenizer_gate.is_reached.is_set)
        await peer.say(Cancel(request_id="first"))
        for number in range(30):
            await peer.say(ask(f"{number}", "x"), Cancel(request_id=f"{number}"))
        await peer.hear_end_of("first", *map(str, range(30)))
        codes = sorted(message.code for message in peer.heard if isinstance(message, Failed))
        assert codes == ["cancelled"] * 8 + ["resource_exhausted"] * 23
        assert engine.status_now().requests.waiting == 0
        async with connected(path) as second:
            await second.say(HELLO, ask("a", "x"))
            await second.hear_end_of("a")
            assert len(refusals(second)) == 1
            tokenizer_gate.is_open.set()
            [user] = serving._users.values()

            def has_room() -> bool:
                user.settle()
                return user.num_requests == 0

            await until(has_room)
            await second.say(ask("b", "x"))
            await second.hear_end_of("b")
            assert second.text("b") == text_after("x", 10)


# -- bytes that wait ------------------------------------------------------------------------------------------------------

_LIMIT = 2_000_000


async def send_slowly(clients: list[socket.socket], data: bytes, look: Callable[[], None]) -> None:
    """To all, in step, until each has all of it or is cut off."""
    sent = dict.fromkeys(clients, 0)
    with anyio.fail_after(10):
        while sent:
            for client in list(sent):
                try:
                    sent[client] += client.send(data[sent[client] : sent[client] + 100_000])
                except BlockingIOError:
                    pass
                except OSError:
                    del sent[client]
                    continue
                if sent[client] == len(data):
                    del sent[client]
            await anyio.lowlevel.checkpoint()
            look()


@pytest.mark.parametrize("kind", ["unfinished frames", "unread answers"])
async def test_a_users_connections_together_hold_a_bounded_number_of_bytes(tmp_path: Path, kind: str) -> None:
    """Sixteen connections of which each holds less than a connection may: those with more than their share are cut off, with
    the reason, and the sum stays below twice the limit; one that holds little is served throughout."""
    limits = DaemonLimits(user_bytes=_LIMIT, connection_output_bytes=_LIMIT // 2)
    async with server(tmp_path, limits=limits, config=FOREVER) as (_, path, serving), connected(path) as modest:
        await modest.say(HELLO)
        await modest.hear(until_count=1)
        [user] = serving._users.values()
        highest = 0

        def look() -> None:
            nonlocal highest
            held = sum(
                session._decoder.num_held_bytes + session._transport.get_write_buffer_size() for session in serving._sessions
            )
            highest = max(highest, held, user.num_bytes)

        if kind == "unfinished frames":
            said = encode(HELLO) + (600_000).to_bytes(4, "little") + bytes(599_999)
        else:
            said = encode(HELLO) + b"".join(encode(Query(query_id=n, kind="status")) for n in range(3000))
        clients = [raw_client(path) for _ in range(16)]
        await send_slowly(clients, said, look)
        for number in range(3):
            await is_served(modest, f"{number}")
            look()
        assert _LIMIT // 2 < highest < 2 * _LIMIT
        assert serving.num_connections < 17 or kind == "unread answers"
        for client in clients:
            client.close()
        await until(lambda: serving.num_connections == 1)
        assert not any(isinstance(message, Failed) for message in modest.heard)
        assert sum(isinstance(message, Finished) for message in modest.heard) == 3
        assert user.num_bytes < 10_000
