"""A daemon in this process: the real server on a real socket, over the fake executor."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.server import Server
from ferrum_rt.runtime.runtime import Runtime
from tests.runtime.engines import fake_engine


@asynccontextmanager
async def daemon(
    tmp_path: Path, *, limits: DaemonLimits | None = None, uids: tuple[int, ...] = (os.getuid(),), **fake: Any
) -> AsyncIterator[tuple[Runtime, Path]]:
    async with server(tmp_path, limits=limits, uids=uids, **fake) as (engine, path, _):
        yield engine, path


@asynccontextmanager
async def server(
    tmp_path: Path, *, limits: DaemonLimits | None = None, uids: tuple[int, ...] = (os.getuid(),), **fake: Any
) -> AsyncIterator[tuple[Runtime, Path, Server]]:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        async with fake_engine(**fake) as (engine, _):
            serving = Server(engine, allowed_uids=uids, limits=limits or DaemonLimits())
            async with anyio.create_task_group() as tasks:
                await tasks.start(serving.run, [listener])
                yield engine, path, serving
                tasks.cancel_scope.cancel()
