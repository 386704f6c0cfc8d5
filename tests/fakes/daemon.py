"""A daemon over the fake executor, in a process of its own: ``python -m tests.fakes.daemon SOCKET OPTIONS``.

OPTIONS is a JSON object of FakeExecutor's arguments, and ``config``, the parts of an EngineConfig. It writes a line to its
standard output when it serves, and ends at SIGTERM.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import uvloop

from ferrum_rt.daemon.server import serve
from ferrum_rt.daemon.session import SessionLimits
from ferrum_rt.daemon.socket_file import claim
from tests.runtime.engines import fake_engine

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def daemon_process(
    path: Path, *, stderr: IO[bytes] | None = None, **options: Any
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """It serves ``path`` when the block begins, and is killed at its end if it still runs. ``stderr`` takes what it says."""
    command = [sys.executable, "-m", "tests.fakes.daemon", str(path), json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            with anyio.fail_after(60):
                await anyio.wait_readable(process.stdout)
            assert process.stdout.readline() == b"ready\n", "the daemon did not start; its standard error says why"
            yield process
        finally:
            process.kill()


async def _main(path: str, config: dict[str, Any], fake: dict[str, Any]) -> None:
    with claim(path) as claimed, anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async with fake_engine(config, **fake) as (engine, _), anyio.create_task_group() as tasks:
            await tasks.start(_serve, engine, claimed.listener)
            print("ready", flush=True)
            async for _ in signals:
                break
            tasks.cancel_scope.cancel()


async def _serve(engine: Any, listener: Any, *, task_status: Any) -> None:
    await serve(engine, listener, allowed_uids=[os.getuid()], limits=SessionLimits(), task_status=task_status)


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_main(sys.argv[1], options.pop("config", {}), options))
