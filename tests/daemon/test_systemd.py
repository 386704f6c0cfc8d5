"""Socket activation, readiness and the watchdog, against real sockets and a real process."""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import pytest

from ferrum_rt.daemon.systemd import READY, STOPPING, activated_sockets, notify, reloading, status, watchdog_interval_s
from ferrum_rt.interfaces.errors import ConfigError

# What systemd does between fork and exec: descriptors from 3 on, the pid that is ours from now on, and then the service.
LAUNCH = """
import os, sys
for place, fd in enumerate(fds := [int(fd) for fd in sys.argv[1].split(",")]):
    os.dup2(fd, 100 + place)
for place in range(len(fds)):
    os.dup2(100 + place, 3 + place)
    os.close(100 + place)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""
SERVICE = """
import json, os
from ferrum_rt.daemon.systemd import activated_sockets
from ferrum_rt.interfaces.errors import ConfigError
try:
    sockets = activated_sockets()
except ConfigError as error:
    print(json.dumps([str(error), [fd for fd in (3, 4) if os.path.exists(f"/proc/self/fd/{fd}")]]))
else:
    report = {
        "names": [one.getsockname() for one in sockets],
        "fds": [one.fileno() for one in sockets],
        "inheritable": [one.get_inheritable() for one in sockets],
        "blocking": [one.getblocking() for one in sockets],
        "again": activated_sockets(),
        "left": [name for name in os.environ if name.startswith("LISTEN_")],
    }
    for one in sockets:
        one.settimeout(30)
        connection, _ = one.accept()
        connection.sendall(b"hello")
    print(json.dumps(report))
"""


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(autouse=True)
def _no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


def activate(*fds: int, names: str) -> "subprocess.Popen[str]":
    """The service, started with these descriptors as systemd would."""
    environment = os.environ | {"LISTEN_FDNAMES": names}
    command = [sys.executable, "-c", LAUNCH, ",".join(map(str, fds)), SERVICE]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, pass_fds=fds)


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        bound.listen()
        yield bound


def test_sockets_of_systemd_are_taken_over(tmp_path: Path) -> None:
    """The service gets the listeners in order, ready for use and not inherited, once; who had connected before is served."""
    paths = [tmp_path / "a", tmp_path / "b"]
    with listener(paths[0]) as first, listener(paths[1]) as second, socket.socket(socket.AF_UNIX) as early:
        early.settimeout(60)
        early.connect(str(paths[0]))
        with activate(first.fileno(), second.fileno(), names="api:extra") as service, socket.socket(socket.AF_UNIX) as late:
            late.settimeout(60)
            late.connect(str(paths[1]))
            assert early.recv(5) == late.recv(5) == b"hello"
            report = json.loads(service.communicate(timeout=60)[0])
    assert report == {
        "names": list(map(str, paths)),
        "fds": [3, 4],
        "inheritable": [False, False],
        "blocking": [False, False],
        "again": [],
        "left": [],
    }


@pytest.mark.parametrize("kind", ["tcp", "datagram", "packets", "connected", "not listening", "no socket"])
def test_other_descriptors_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    """A descriptor on which nobody could tell who connects, or that nobody can connect to, is an error that names it;
    the sockets are closed, and what is not one is left alone."""
    with ExitStack() as stack:
        good = stack.enter_context(listener(tmp_path / "a"))
        other: socket.socket | IO[bytes]
        if kind == "tcp":
            other = socket.create_server(("127.0.0.1", 0))
        elif kind == "datagram":
            other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        elif kind == "packets":
            other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            other.bind("")
            other.listen()
        elif kind == "connected":
            other, far = socket.socketpair()
            stack.enter_context(far)
        elif kind == "not listening":
            other = socket.socket(socket.AF_UNIX)
        else:
            other = stack.enter_context(tempfile.TemporaryFile())
        stack.enter_context(other)
        service = stack.enter_context(activate(good.fileno(), other.fileno(), names="api:odd"))
        message, left = json.loads(service.communicate(timeout=60)[0])
    assert message.startswith("LISTEN_FDS: descriptor 4 (odd) is not a listening Unix stream socket")
    assert "ListenStream=" in message
    assert left == ([4] if kind == "no socket" else [])


def test_variables_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our parent forgot to take out is not for us: no socket, and the variables stay."""
    assert activated_sockets() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert activated_sockets() == []
    assert os.environ["LISTEN_FDS"] == "1"


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1_0", " 1", "٣", "1\n", "9" * 5000])
def test_a_variable_that_is_no_number_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else int() would take, or would choke on, is an error that names the variable."""
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name} is"):
        activated_sockets()


@contextmanager
def manager(address: str | bytes) -> Iterator[socket.socket]:
    """systemd's end of the notices."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(address)
        channel.setblocking(False)
        yield channel


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_notices_arrive(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every notice is one datagram, to a path as to an abstract name."""
    name = str(tmp_path / "notify")
    with manager(name if kind == "path" else f"\0{name}") as channel:
        monkeypatch.setenv("NOTIFY_SOCKET", name if kind == "path" else f"@{name}")
        notify(f"{READY}\n{status('serving')}")
        notify(STOPPING)
        assert channel.recv(4096) == b"READY=1\nSTATUS=serving"
        assert channel.recv(4096) == b"STOPPING=1"


def test_a_status_is_one_line() -> None:
    """Text with line ends cannot make another assignment of its own."""
    assert status("loading\nMAINPID=1\r\nREADY=1 é") == "STATUS=loading MAINPID=1 READY=1 é"


def test_a_reload_says_when() -> None:
    """The time is that of CLOCK_MONOTONIC, in microseconds."""
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = reloading().split("\n")
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= after


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1", "/nowhere/at/all", "@nobody", "/" + "x" * 200, "@"])
def test_a_notice_that_nobody_wants_is_no_error(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a manager, or with one that is gone or of a kind we do not know, nothing happens."""
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify(READY)


def test_a_notice_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that does not read holds nobody up, however many notices there are; nor does one too long or not text."""
    with manager(str(tmp_path / "notify")) as channel:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("STATUS=" + "x" * 10_000_000)
        notify("STATUS=\udcff")
        assert channel.recv(4096) == b"STATUS=?"
        for _ in range(3000):
            notify(READY)
        received = 0
        while select.select([channel], [], [], 0)[0]:
            assert channel.recv(4096) == READY.encode()
            received += 1
        assert 0 < received < 3000


def test_the_watchdog_is_fed_twice_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time that systemd gives; none where it does not watch, or watches another process."""
    assert watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    assert watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    with pytest.raises(ConfigError, match=r"^WATCHDOG_USEC is 'soon'"):
        watchdog_interval_s()
