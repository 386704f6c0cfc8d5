"""Connections to an engine: takes them in, and ends them when it is ended."""

import asyncio
import os
import socket
from collections.abc import Collection

import anyio
from anyio.abc import TaskStatus

from ferrum_rt.daemon.session import Session, SessionLimits
from ferrum_rt.daemon.socket_file import check_peer, peer
from ferrum_rt.interfaces.errors import Cancelled
from ferrum_rt.runtime.runtime import Runtime


async def serve(
    engine: Runtime,
    listener: socket.socket,
    *,
    allowed_uids: Collection[int],
    limits: SessionLimits,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``engine`` on a listening Unix socket, which stays the caller's, until cancelled; then every connection is told
    so and closed."""
    sessions: set[Session] = set()

    def identify(transport: asyncio.BaseTransport) -> str:
        # A copy, for what a transport shows of its socket is not the whole of it on every event loop.
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
            who = peer(connection)
        check_peer(who, allowed_uids)
        return f"uid {who.uid}"

    def connect() -> Session:
        session = Session(engine, identify, limits, sessions.discard)
        sessions.add(session)
        return session

    server = await asyncio.get_running_loop().create_unix_server(connect, sock=listener.dup())
    try:
        task_status.started()
        await anyio.sleep_forever()
    finally:
        server.close()
        for session in list(sessions):
            session.cut(Cancelled("the daemon is shutting down"))
