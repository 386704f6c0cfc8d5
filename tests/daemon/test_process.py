"""The daemon's process beside its signals: its log, the command that starts it, and systemd's socket."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import msgspec
import pytest

from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Hello, Submit, WireRequest, WireSampling
from tests.daemon.observing import answers, ends, is_left, reload
from tests.daemon.test_session import HELLO, ask, connected
from tests.fakes.daemon import CLOSED, ROOT, forked_daemon, started
from tests.runtime.engines import text_after


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ferrum-rt" / "default.sock"


# -- what it writes -------------------------------------------------------------------------------------------------------

CANARY = "quick brown canary"


async def test_the_log_has_nothing_that_was_said(path: Path, tmp_path: Path) -> None:
    """Not at its lowest level, wherever in a request, right or wrong, somebody says it; nor what was answered. Each line is
    a JSON object with a time, a level, a logger and an event."""
    request = WireRequest(text=CANARY, client_id=CANARY, session_id=CANARY, metadata={CANARY: CANARY})
    wrong = WireRequest(text=CANARY, sampling=WireSampling(temperature=-1.0, stop=[CANARY]))
    mistyped = msgspec.msgpack.encode({"type": "credit", "request_id": CANARY, "chunks": CANARY})
    unknown = msgspec.msgpack.encode({"type": "credit", CANARY: CANARY})
    garbage = CANARY.encode() * 100
    file = tmp_path / "ferrum.toml"
    file.write_text("[daemon]\nlog_level = 'debug'")
    async with forked_daemon(path, config_file=str(file)) as daemon:
        async with connected(path) as peer:
            await peer.say(Hello(version=1, client=CANARY, trace={CANARY: CANARY}))
            await peer.say(Submit(request_id=CANARY, request=request, credit=300))
            await peer.say(Submit(request_id="w", request=wrong, credit=9))
            await peer.hear_end_of(CANARY, "w")
        for body in (mistyped, unknown, garbage):
            async with await anyio.connect_unix(path) as stream:
                frame = len(body).to_bytes(4, "little") + body
                await stream.send(encode(HELLO) + frame)
                with suppress(anyio.BrokenResourceError):
                    async for _ in stream:
                        pass
        daemon.send(signal.SIGTERM)
        assert await daemon.end() == 0
        events = [line["event"] for line in daemon.log()]
        assert events.count("cut off") == 3
        assert all({"time", "level", "logger", "event"} <= line.keys() for line in daemon.log())
        text = daemon.log_path.read_text()
        assert CANARY not in text
        assert text_after(CANARY, 256)[:20] not in text


@pytest.mark.parametrize("stderr", [CLOSED, "/dev/full", "abandoned", "stuck"])
async def test_nobody_needs_to_read_the_log(path: Path, tmp_path: Path, stderr: str) -> None:
    """Without a standard error, on a full disk, with a reader that has gone, and with one that reads nothing for longer than
    a pipe holds, the daemon serves, reloads and ends with status 0."""
    with ExitStack() as stack:
        if not stderr.startswith("/") and stderr != CLOSED:
            os.mkfifo(tmp_path / stderr)
            reader = os.open(tmp_path / stderr, os.O_RDONLY | os.O_NONBLOCK)
            closing = stack.enter_context(ExitStack())
            closing.callback(os.close, reader)
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
            stderr = str(tmp_path / stderr)
        async with forked_daemon(path, stderr=stderr) as daemon:
            if stderr.endswith("abandoned"):
                closing.close()
            for _ in range(40):
                await reload(daemon)
            assert await answers(path)
            daemon.send(signal.SIGTERM)
            assert await daemon.end() == 0


# -- in an interpreter of its own -----------------------------------------------------------------------------------------

# What systemd does between fork and exec.
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
FERRUM_RT = ["-c", "import sys; from ferrum_rt.cli import main; sys.exit(main())"]


@pytest.mark.slow
async def test_systemds_socket_is_served_and_left_to_it(tmp_path: Path) -> None:
    """Who connected before the daemon was started is answered by the demo model; the socket's file, which is systemd's,
    stays when the daemon ends, and no lock is taken."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        async with connected(path) as peer:
            await peer.say(HELLO, ask("a", "def "))
            command = [sys.executable, "-c", LAUNCH, str(listener.fileno()), *FERRUM_RT, "serve", "--device", "cpu"]
            async with started(command, {"XDG_RUNTIME_DIR": "/nowhere"}, pass_fds=[listener.fileno()]) as process:
                await peer.hear_end_of("a")
                assert ends(peer) == {"a": "finished"}
                process.terminate()
                assert await anyio.to_thread.run_sync(process.wait) == 0
        assert os.listdir(tmp_path) == ["s"]


@pytest.mark.slow
async def test_the_command_serves(path: Path) -> None:
    """ferrum-rt serve answers with the demo model; a second one for the same path ends with status 2 and names the first."""
    command = [sys.executable, *FERRUM_RT, "serve", "--socket", str(path), "--device", "cpu"]
    async with started(command, stderr=subprocess.PIPE) as process:
        async with connect(path) as engine:
            assert (await engine.infer("def ", max_tokens=8, ignore_eos=True)).usage.completion_tokens == 8
        second = await anyio.run_process(command, check=False, cwd=ROOT)
        assert second.returncode == 2
        assert second.stderr.decode().startswith(f"ferrum-rt: error: {path}: another daemon serves it (pid {process.pid}); ")
        process.send_signal(signal.SIGINT)
        _, log = await anyio.to_thread.run_sync(process.communicate)
        assert process.returncode == 0
        assert [json.loads(line)["event"] for line in log.splitlines()] == ["loading", "ready", "draining", "stopped"]
        assert not is_left(path)


@pytest.mark.slow
async def test_a_wrong_configuration_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    """With status 2 and one line that names file and key."""
    file = tmp_path / "ferrum.toml"
    file.write_text("[daemon]\nsoket = 'x'")
    script = (
        "import sys; from ferrum_rt.cli import main; status = main(); assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = await anyio.run_process([sys.executable, "-c", script, "serve", "--config", str(file)], check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"ferrum-rt: error: {file}: unknown configuration key 'daemon.soket'; did you mean 'socket'?\n"
    )
