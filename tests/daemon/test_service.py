"""The daemon's life, as a process of its own: what it tells, what signals do to it, and what it leaves behind."""

import fcntl
import os
import re
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

import anyio
import pytest

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.interfaces.errors import Cancelled, ConnectionLost, EngineFailed, NotFound
from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.messages import Accepted, Credit, Failed, GoingAway
from tests.daemon.observing import answers, ends, is_left, reload
from tests.daemon.serving import server
from tests.daemon.test_session import HELLO, Peer, ask, connected
from tests.fakes.daemon import AT_THE_GATE, LOADING, ForkedDaemon, forked_daemon
from tests.runtime.engines import text_after

LONG_DRAIN = {"scheduler": {"drain_s": 60.0}}
SHORT_DRAIN = {"scheduler": {"drain_s": 0.05}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ferrum-rt" / "default.sock"


def is_lock_free(path: Path) -> bool:
    with open(f"{path}.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@asynccontextmanager
async def parked_request(path: Path) -> AsyncIterator[Peer]:
    """A connection whose request "a" of 20 tokens has begun, and waits for credit."""
    async with connected(path) as peer:
        await peer.say(HELLO, ask("a", "x", max_tokens=20, credit=1))
        with anyio.fail_after(10):
            while not peer.chunks("a"):
                await peer.hear(until_count=len(peer.heard) + 1)
        yield peer


async def heard(peer: Peer, kind: type) -> None:
    """Listen until it has heard one of these."""
    while not any(isinstance(message, kind) for message in peer.heard):
        await peer.hear(until_count=len(peer.heard) + 1)


# -- beginning and end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_says_when_it_serves_and_leaves_nothing(path: Path, number: signal.Signals) -> None:
    """systemd and the log are told of socket, pid and model; told to stop, an idle daemon ends at once with status 0, its
    socket gone and its lock free."""
    async with forked_daemon(path, ready=False) as daemon:
        assert "STATUS=serving fake" in await daemon.notice("READY=1")
        assert await answers(path)
        assert not is_lock_free(path)
        daemon.send(number)
        await daemon.notice("STOPPING=1")
        assert await daemon.end() == 0
        assert not is_left(path)
        assert is_lock_free(path)
        assert [line["event"] for line in daemon.log()] == ["loading", "ready", "draining", "stopped"]
        loading, ready, draining, stopped = daemon.log()
        assert (loading["pid"], loading["sockets"]) == (daemon.pid, [str(path)])
        assert ready["model"] == "fake"
        assert (draining["cause"], draining["requests"]) == (number.name, 0)
        assert stopped["status"] == 0


async def test_work_under_way_is_finished(path: Path) -> None:
    """While it drains, who is connected is told, new requests and new connections are refused as cancelled, and what was
    under way goes on; when that has finished, the daemon ends without waiting for the rest of its time."""
    async with forked_daemon(path, config=LONG_DRAIN) as daemon, parked_request(path) as peer, connect(path) as engine:
        with anyio.fail_after(30):
            daemon.send(signal.SIGTERM)
            await heard(peer, GoingAway)
            await peer.say(ask("new", "y"))
            await peer.hear_end_of("new")
            with pytest.raises(Cancelled):
                await engine.infer("y")
            with pytest.raises(Cancelled):
                await connect(path).__aenter__()
            await peer.say(Credit(request_id="a", chunks=100))
            await peer.hear_all()
            assert await daemon.end() == 0
        [going_away] = [m for m in peer.heard if isinstance(m, GoingAway)]
        assert going_away.drain_s == 60.0
        assert ends(peer) == {"new": "cancelled", "a": "finished", "": "cancelled"}
        assert peer.text("a") == text_after("x", 20)
        assert daemon.logged("draining")[0]["requests"] == 1


async def test_work_that_takes_too_long_is_cancelled(path: Path) -> None:
    """What has not finished when the time is over ends as cancelled; the daemon's status is 0 all the same."""
    async with forked_daemon(path, config=SHORT_DRAIN) as daemon, parked_request(path) as peer:
        daemon.send(signal.SIGTERM)
        await peer.hear_all()
        assert await daemon.end() == 0
        assert ends(peer) == {"a": "cancelled", "": "cancelled"}
        assert not is_left(path)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_drain(path: Path, second: signal.Signals) -> None:
    """At once, with a last message for each request and each connection."""
    async with forked_daemon(path, config=LONG_DRAIN) as daemon, parked_request(path) as peer:
        daemon.send(signal.SIGTERM)
        await heard(peer, GoingAway)
        with anyio.fail_after(30):
            daemon.send(second)
            await peer.hear_all()
            assert await daemon.end() == 0
        assert ends(peer) == {"a": "cancelled", "": "cancelled"}
        assert not is_left(path)
        assert [line["signal"] for line in daemon.logged("the drain is cut short")] == [second.name]


@pytest.mark.slow
async def test_a_signal_while_all_is_closed_changes_nothing(path: Path) -> None:
    """Once its connections are closed the daemon may still wait for a step: no signal ends it before it has tidied up."""
    async with forked_daemon(path, config=SHORT_DRAIN, step_s=0.3) as daemon, parked_request(path) as peer:
        await peer.say(Credit(request_id="a", chunks=100))
        daemon.send(signal.SIGTERM)
        await peer.hear_all()
        for _ in range(10):
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                daemon.send(number)
            await anyio.sleep(0.01)
        assert await daemon.end() == 0
        assert ends(peer) == {"a": "cancelled", "": "cancelled"}
        assert not is_left(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_daemon_that_loads_ends_at_once(path: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A load is not waited for; and the socket that is left is no hindrance to the next daemon."""
    with gate(tmp_path) as load_gate:
        async with forked_daemon(path, ready=False, load_gate=load_gate.name) as daemon:
            await daemon.notice(LOADING)
            daemon.send(number)
            with anyio.fail_after(10):
                assert await daemon.end() == -number
    async with forked_daemon(path):
        assert await answers(path)


async def test_a_reload_while_it_loads_changes_nothing(path: Path, tmp_path: Path) -> None:
    """SIGHUP does not end a daemon that is not ready; who connects meanwhile is served once it is."""
    async with AsyncExitStack() as stack:
        with gate(tmp_path) as load_gate:
            daemon = await stack.enter_async_context(forked_daemon(path, ready=False, load_gate=load_gate.name))
            await daemon.notice(LOADING)
            peer = await stack.enter_async_context(connected(path))
            await peer.say(HELLO, ask("a", "x"))
            daemon.send(signal.SIGHUP)
        await daemon.notice("READY=1")
        await peer.hear_end_of("a")
        assert peer.text("a") == text_after("x", 10)


@contextmanager
def gate(tmp_path: Path) -> Iterator[IO[str]]:
    """Closed until the block's end."""
    with open(tmp_path / "gate", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


# -- who serves a path ----------------------------------------------------------------------------------------------------


async def test_of_five_daemons_one_serves(path: Path, tmp_path: Path) -> None:
    """Started together on one path, the others end with status 2 and name the pid of the one that serves."""
    async with AsyncExitStack() as stack:
        with gate(tmp_path) as start:
            daemons = [await stack.enter_async_context(forked_daemon(path, ready=False, gate=start.name)) for _ in range(5)]
            for daemon in daemons:
                await daemon.notice(AT_THE_GATE)
        ended = dict[ForkedDaemon, int]()
        all_but_one = anyio.Event()

        async def wait_for(daemon: ForkedDaemon) -> None:
            ended[daemon] = await daemon.end()
            if len(ended) == 4:
                all_but_one.set()

        async with anyio.create_task_group() as waiting:
            for daemon in daemons:
                waiting.start_soon(wait_for, daemon)
            with anyio.fail_after(30):
                await all_but_one.wait()
            waiting.cancel_scope.cancel()
        [winner] = set(daemons) - ended.keys()
        await winner.notice("READY=1")
        assert await answers(path)
        assert set(ended.values()) == {2}
        told = [daemon.log_path.read_text() for daemon in ended]
        # Between taking the lock and writing its pid there the winner has no name yet.
        expected = rf"ferrum-rt: error: {path}: another daemon serves it \(pid ({winner.pid}|not known yet)\); .*\n"
        assert all(re.fullmatch(expected, text) for text in told), told


async def test_a_killed_daemons_path_is_free(path: Path) -> None:
    """SIGKILL leaves the socket's file; the next daemon takes the path over, and clients of the first have lost theirs."""
    async with forked_daemon(path) as first, parked_request(path) as peer:
        first.send(signal.SIGKILL)
        assert await first.end() == -signal.SIGKILL
        await peer.hear_all()
        assert ends(peer) == {}
        assert is_left(path)
        with pytest.raises(NotFound):
            await connect(path).__aenter__()
        async with forked_daemon(path) as second:
            assert await answers(path)
            second.send(signal.SIGTERM)
            assert await second.end() == 0
        assert not is_left(path)


# -- reload ---------------------------------------------------------------------------------------------------------------


async def outcome(peer: Peer, request_id: str) -> str:
    """Of a submit that can go no further than to be accepted."""
    await peer.say(ask(request_id, "x", credit=0))
    while True:
        for message in peer.heard:
            if isinstance(message, Accepted | Failed) and message.request_id == request_id:
                return "accepted" if isinstance(message, Accepted) else message.code
        await peer.hear(until_count=len(peer.heard) + 1)


CONFIG = """
[daemon]
socket = "{path}"
[daemon.limits]
connection_requests = 1
"""
RELOADED = """
[model]
source = "/models/other"
[scheduler]
drain_s = 3.0
[scheduler.clients."uid 0/default"]
weight = 2.0
[daemon]
socket = "{path}.other"
log_level = "debug"
allowed_uids = [4242]
otlp = "http://localhost:4318"
[daemon.limits]
connection_requests = 2
"""


async def test_a_reload_applies_what_it_can(path: Path, tmp_path: Path) -> None:
    """New limits hold in connections that are open, the new log level at once; what needs a restart is named, in this reload
    and in the next, and systemd is told of each."""
    file = tmp_path / "ferrum.toml"
    file.write_text(CONFIG.format(path=path))
    async with forked_daemon(path, config_file=str(file), socket=None) as daemon, connected(path) as peer:
        await peer.say(HELLO)
        assert [await outcome(peer, "a"), await outcome(peer, "b")] == ["accepted", "resource_exhausted"]
        file.write_text(RELOADED.format(path=path))
        await reload(daemon)
        assert [await outcome(peer, "c"), await outcome(peer, "d")] == ["accepted", "resource_exhausted"]
        assert not daemon.logged("connected")
        assert await answers(path)
        assert daemon.logged("connected")
        await reload(daemon)
        waiting = ["engine.model.source", "engine.scheduler.drain_s", "daemon.socket", "daemon.otlp"]
        applied = [
            "engine.scheduler.clients",
            "daemon.allowed_uids",
            "daemon.log_level",
            "daemon.limits.connection_requests",
        ]
        assert [(line["applied"], line["need_a_restart"]) for line in daemon.logged("reloaded")] == [
            (applied, waiting),
            ([], waiting),
        ]


async def test_other_uids_are_allowed(tmp_path: Path) -> None:
    """Who is allowed no more cannot connect from then on; connections that it has stay."""
    async with server(tmp_path) as (_, path, serving), connected(path) as peer:
        await peer.say(HELLO, ask("a", "x"))
        await peer.hear_end_of("a")
        serving.reload(allowed_uids={os.getuid() + 1}, limits=DaemonLimits())
        async with connected(path) as refused:
            await refused.hear_all()
            assert ends(refused) == {"": "permission_denied"}
        await peer.say(ask("b", "x"))
        await peer.hear_end_of("b")
        serving.reload(allowed_uids={os.getuid()}, limits=DaemonLimits())
        assert await answers(path)
    assert ends(peer) == {"a": "finished", "b": "finished"}


@pytest.mark.parametrize("text", ["[daemon", "[daemon.limits]\nconnection_requests = 0", None, "x = " + "[" * 20_000])
async def test_a_broken_file_changes_nothing(path: Path, tmp_path: Path, text: str | None) -> None:
    """The log says what is wrong with it, systemd that the daemon is ready again, and everything is as it was."""
    file = tmp_path / "ferrum.toml"
    file.write_text(CONFIG.format(path=path))
    async with forked_daemon(path, config_file=str(file)) as daemon, connected(path) as peer:
        await peer.say(HELLO)
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        await reload(daemon)
        assert [await outcome(peer, "a"), await outcome(peer, "b")] == ["accepted", "resource_exhausted"]
        [line] = daemon.logged("not reloaded")
        assert line["level"] == "error"
        assert line["reason"].startswith(f"{file}: ")
        assert not daemon.logged("reloaded")


async def test_a_reload_makes_room_for_more_connections(path: Path, tmp_path: Path) -> None:
    """The process may have as many descriptors as the new limit needs."""
    file = tmp_path / "ferrum.toml"
    file.write_text("")
    async with forked_daemon(path, config_file=str(file)) as daemon:
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (700, hard))
        file.write_text("[daemon.limits]\nconnections = 1000")
        await reload(daemon)
        assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[0] >= min(1000, hard)


async def test_without_a_file_a_reload_is_no_error(path: Path) -> None:
    """There is nothing to change."""
    async with forked_daemon(path) as daemon:
        await reload(daemon)
        [line] = daemon.logged("reloaded")
        assert (line["applied"], line["need_a_restart"]) == ([], [])
        assert await answers(path)


# -- what watches it ------------------------------------------------------------------------------------------------------


async def test_the_watchdog_is_fed(path: Path) -> None:
    """If systemd wants to hear of it, it does, again and again."""
    async with forked_daemon(path, environment={"WATCHDOG_USEC": "20000"}) as daemon:
        for _ in range(3):
            await daemon.notice("WATCHDOG=1")


async def test_a_wrong_watchdog_is_told_before_the_model_is_loaded(path: Path) -> None:
    """A variable that is no number is an error of the start, not of a daemon that serves."""
    async with forked_daemon(path, ready=False, environment={"WATCHDOG_USEC": "soon"}) as daemon:
        assert await daemon.end() == 2
        assert "WATCHDOG_USEC is 'soon'" in daemon.log_path.read_text()


async def test_a_broken_engine_ends_the_daemon(path: Path) -> None:
    """Its requests end with engine_failed, its connections are closed, its status is 1, and it leaves nothing behind."""
    async with forked_daemon(path, broken_at=3) as daemon, connect(path) as engine:
        with pytest.raises(EngineFailed):
            await engine.infer("x", max_tokens=20)
        with anyio.fail_after(10):
            assert await daemon.end() == 1
        with pytest.raises((ConnectionLost, Cancelled, EngineFailed)):
            await engine.infer("y")
        assert [line["level"] for line in daemon.logged("the engine has failed")] == ["critical"]
        assert not is_left(path)
        assert is_lock_free(path)
