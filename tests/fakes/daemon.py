"""A daemon over the fake executor, in a process of its own: all but the model is the real one.

``daemon_process`` starts an interpreter for it, ``forked_daemon`` forks a process that has everything loaded already, in a
tenth of the time. OPTIONS of both, and of ``python -m tests.fakes.daemon SOCKET OPTIONS``, where they are a JSON object:
FakeExecutor's arguments; ``config``, the parts of an EngineConfig; ``daemon``, fields of the table daemon; ``config_file``,
the path of a configuration; ``socket``, if not SOCKET; ``gate``, a file at whose lock the daemon waits before it starts;
``load_gate``, one at which its model's load waits; ``broken_at``, a step that returns nonsense; ``leaks``, to log each
prompt.
"""

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import anyio

from ferrum_rt.cli.output import report_error
from ferrum_rt.daemon import systemd
from ferrum_rt.daemon.config import load_serve_config
from ferrum_rt.daemon.service import run_daemon
from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.threads.worker import finished
from tests.fakes.executor import FakeExecutor, fake_model
from tests.said import REPORTED_TO, Reported, follow

ROOT = Path(__file__).parents[2]
LIMIT_S = 60
LOG, CLOSED = "log", ""
AT_THE_GATE, LOADING = "STATUS=at the gate", "STATUS=the model is at its gate"


class Notices:
    """systemd's end of the notification socket."""

    def __enter__(self) -> "Notices":
        self._directory = tempfile.TemporaryDirectory()
        self.path = f"{self._directory.name}/notify"
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(self.path)
        self._channel.setblocking(False)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._channel.close()
        self._directory.cleanup()

    async def wait_for(self, line: str, is_alive: Callable[[], bool]) -> str:
        """The next notice that has this line; those before it are dropped. Who sends them must be alive until then."""
        with anyio.fail_after(LIMIT_S):
            while True:
                with anyio.move_on_after(0.5):
                    await anyio.wait_readable(self._channel)
                was_alive = is_alive()
                for notice in self._received():
                    if line in notice.split("\n"):
                        return notice
                assert was_alive, f"it ended without having said {line}; its standard error says why"

    def _received(self) -> Iterator[str]:
        with suppress(BlockingIOError):
            while True:
                yield self._channel.recv(4096).decode()


# -- an interpreter of its own --------------------------------------------------------------------------------------------


@asynccontextmanager
async def daemon_process(
    path: Path, *, stderr: IO[bytes] | None = None, **options: Any
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """It serves ``path`` when the block begins, and is killed at its end. Its log goes to ``stderr``, or to ours."""
    command = [sys.executable, "-m", "tests.fakes.daemon", str(path), json.dumps(options)]
    async with started(command, stderr=stderr) as process:
        yield process


@asynccontextmanager
async def started(
    command: list[str], environment: Mapping[str, str] | None = None, **popen: Any
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process that has told systemd, which we are to it, that it is ready."""
    with Notices() as notices:
        variables = os.environ | (environment or {}) | {"NOTIFY_SOCKET": notices.path}
        with subprocess.Popen(command, cwd=ROOT, env=variables, **popen) as process:  # noqa: ASYNC220 - it takes milliseconds
            try:
                await notices.wait_for("READY=1", lambda: process.poll() is None)
                yield process
            finally:
                process.kill()


# -- a fork ---------------------------------------------------------------------------------------------------------------


class ForkedDaemon:
    """``log_path`` is where its standard error goes, if it goes to LOG."""

    def __init__(self, process: BaseProcess, notices: Notices, log_path: Path) -> None:
        assert process.pid is not None
        self.process, self.pid, self.log_path = process, process.pid, log_path
        self._notices = notices

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def notice(self, line: str) -> str:
        """Wait until it tells systemd this; returns all that it tells with it."""
        return await self._notices.wait_for(line, self.process.is_alive)

    async def end(self) -> int:
        """Wait for its end; returns the exit status, or the negative number of the signal that ended it."""
        with anyio.fail_after(LIMIT_S):
            await anyio.wait_readable(self.process.sentinel)
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def log(self) -> list[dict[str, Any]]:
        """Its lines, which must be JSON objects, one each."""
        lines = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        assert all(isinstance(line, dict) for line in lines)
        return lines

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines about this."""
        return [line for line in self.log() if line["event"] == event]


@asynccontextmanager
async def forked_daemon(
    path: Path, *, environment: Mapping[str, str] | None = None, stderr: str = LOG, ready: bool = True, **options: Any
) -> AsyncIterator[ForkedDaemon]:
    """It serves ``path`` when the block begins, or has just been forked if not ``ready``; at the block's end it is killed.
    It leads a session of its own. Its standard error goes to LOG, to the file of that name, or is CLOSED."""
    # The server that is forked has one thread and has run nothing of ours: it only imported this module.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with Notices() as notices, tempfile.TemporaryDirectory() as directory:
        log_path = Path(directory) / "log"
        variables = {**(environment or {}), "NOTIFY_SOCKET": notices.path}
        place = str(log_path) if stderr == LOG else stderr
        process = context.Process(target=_forked, args=(str(path), options, variables, place))
        process.start()
        try:
            daemon = ForkedDaemon(process, notices, log_path)
            if ready:
                await daemon.notice("READY=1")
            yield daemon
        finally:
            process.kill()
            process.join()
            process.close()


def _forked(path: str, options: dict[str, Any], variables: Mapping[str, str], stderr: str) -> None:
    os.setsid()
    os.environ |= variables
    if stderr == CLOSED:
        os.close(2)
        sys.stderr = None  # as the interpreter has it
    else:
        opened = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, 2)
        os.close(opened)
    sys.exit(_main(path, options))


# -- in the daemon's process ----------------------------------------------------------------------------------------------


class _BrokenExecutor(FakeExecutor):
    """From the step ``broken_at`` on it returns nothing for what the batch holds."""

    def __init__(self, config: EngineConfig, broken_at: int, **options: Any) -> None:
        super().__init__(config, **options)
        self._broken_at = broken_at

    def execute(self, step: StepInput) -> Future[StepOutput]:
        output = super().execute(step)
        return finished(StepOutput([], [])) if self.num_steps >= self._broken_at else output


def _main(path: str, options: dict[str, Any]) -> int:
    """As the command line does it; watched, if a test started it."""
    if REPORTED_TO in os.environ:
        Reported(Path(os.environ[REPORTED_TO])).begin()
    if options.pop("leaks", False):
        follow(Generation, "__init__", lambda given, _: logging.getLogger("ferrum_rt").warning("%s", given[1].prompt))
    file, fields = options.pop("config_file", None), options.pop("config", {})
    gate, load_gate, place = options.pop("gate", None), options.pop("load_gate", None), options.pop("socket", path)
    daemon = options.pop("daemon", {}) | ({} if place is None else {"socket": place})
    read_config = partial(load_serve_config, Path(file) if file else None, model=None, daemon=daemon, fields=fields)

    def load(config: EngineConfig) -> LoadedModel:
        _pass(load_gate, LOADING)
        kind = _BrokenExecutor if "broken_at" in options else FakeExecutor
        return fake_model(config, kind(config, **options))

    _pass(gate, AT_THE_GATE)
    try:
        return run_daemon(read_config(), read_config, load)
    except FerrumError as error:
        report_error(error)
        return 2


def _pass(gate: str | None, notice: str) -> None:
    if gate is not None:
        systemd.notify(notice)
        with open(gate) as file:
            fcntl.flock(file, fcntl.LOCK_SH)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], json.loads(sys.argv[2])))
