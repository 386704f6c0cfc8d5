"""A daemon over the fake executor, in a process of its own: ``python -m tests.fakes.daemon SOCKET OPTIONS``.

OPTIONS is a JSON object of FakeExecutor's arguments; ``config``, the parts of an EngineConfig; and ``config_file``, the path
of a configuration. All but the model is the real daemon.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from ferrum_rt.daemon.config import load_serve_config
from ferrum_rt.daemon.service import run_daemon
from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.runtime.loader import LoadedModel
from tests.fakes.executor import FakeExecutor, fake_model

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def daemon_process(path: Path, **options: Any) -> AsyncIterator[subprocess.Popen[bytes]]:
    """It serves ``path`` when the block begins, and is killed at its end. Its log goes to standard error."""
    command = [sys.executable, "-m", "tests.fakes.daemon", str(path), json.dumps(options)]
    async with started(command) as process:
        yield process


@asynccontextmanager
async def started(
    command: list[str], environment: Mapping[str, str] | None = None, **popen: Any
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process that has told systemd, which we are to it, that it is ready."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"{directory}/notify")
        notified.setblocking(False)
        variables = os.environ | (environment or {}) | {"NOTIFY_SOCKET": f"{directory}/notify"}
        with subprocess.Popen(command, cwd=ROOT, env=variables, **popen) as process:  # noqa: ASYNC220
            try:
                with anyio.fail_after(60):
                    await _ready(notified, process)
                yield process
            finally:
                process.kill()


async def _ready(notified: socket.socket, process: subprocess.Popen[bytes]) -> None:
    while True:
        with anyio.move_on_after(0.5):
            await anyio.wait_readable(notified)
            if b"READY=1" in notified.recv(4096):
                return
        assert process.poll() is None, f"it ended with status {process.returncode}; its standard error says why"


def _main(path: str, options: dict[str, Any]) -> int:
    file, fields = options.pop("config_file", None), options.pop("config", {})
    read_config = partial(load_serve_config, Path(file) if file else None, model=None, socket=path, fields=fields)

    def load(config: EngineConfig) -> LoadedModel:
        return fake_model(config, FakeExecutor(config, **options))

    return run_daemon(read_config(), read_config, load)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], json.loads(sys.argv[2])))
