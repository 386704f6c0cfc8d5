"""A daemon in this process: the real server on a real socket, over the fake executor."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from ferrum_rt.daemon.server import serve
from ferrum_rt.daemon.session import SessionLimits
from ferrum_rt.runtime.runtime import Runtime
from tests.runtime.engines import fake_engine


@asynccontextmanager
async def daemon(
    tmp_path: Path, *, limits: SessionLimits | None = None, uids: tuple[int, ...] = (os.getuid(),), **fake: Any
) -> AsyncIterator[tuple[Runtime, Path]]:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        async with fake_engine(**fake) as (engine, _):
            async with anyio.create_task_group() as tasks:

                async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
                    await serve(
                        engine, listener, allowed_uids=uids, limits=limits or SessionLimits(), task_status=task_status
                    )

                await tasks.start(run)
                yield engine, path
                tasks.cancel_scope.cancel()
