"""Connections to an engine: takes them in, and ends them when it is ended."""

import asyncio
import os
import socket
import struct
from collections.abc import Collection

import anyio
from anyio.abc import TaskStatus

from ferrum_rt.daemon.session import Session, SessionLimits
from ferrum_rt.interfaces.errors import Cancelled, PermissionDenied
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
        uid = _peer_uid(transport)
        if uid not in allowed_uids:
            raise PermissionDenied(f"uid {uid} may not use this daemon")
        return f"uid {uid}"

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


def _peer_uid(transport: asyncio.BaseTransport) -> int:
    """Of the process that connected (SO_PEERCRED, unix(7))."""
    file = os.dup(transport.get_extra_info("socket").fileno())
    with socket.socket(fileno=file) as peer:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)
