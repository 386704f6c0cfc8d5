"""Connections to an engine: takes them in, looks after them, and ends them when it is ended."""

import asyncio
import errno
import logging
import socket
from collections.abc import Collection
from contextlib import suppress

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.session import CLOSE_LIMIT_S, Session, Turns, failure
from ferrum_rt.daemon.socket_file import Peer, check_peer, peer
from ferrum_rt.daemon.users import User
from ferrum_rt.interfaces.errors import Cancelled, FerrumError, ResourceExhausted
from ferrum_rt.ipc.framing import encode
from ferrum_rt.runtime.runtime import Runtime

_CHECK_EVERY_S = 1.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_S = 0.1

_log = logging.getLogger(__name__)


class Server:
    """``allowed_uids`` and ``limits`` may be replaced at any time, by ``reload``."""

    def __init__(self, engine: Runtime, *, allowed_uids: Collection[int], limits: DaemonLimits) -> None:
        self._engine = engine
        self._allowed_uids, self._limits = allowed_uids, limits
        self._sessions: set[Session] = set()
        self._turns = Turns()
        self._users: dict[int, User] = {}
        self._refusal: Cancelled | None = None
        self._is_empty = anyio.Event()

    @property
    def num_connections(self) -> int:
        return len(self._sessions)

    def reload(self, *, allowed_uids: Collection[int], limits: DaemonLimits) -> None:
        """From here on. Connections stay, those of users too who may not open one any more; a frame's limit is theirs for
        life."""
        self._allowed_uids, self._limits = allowed_uids, limits
        for session in self._sessions:
            session.limits = limits

    async def run(
        self, listeners: Collection[socket.socket], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve listening, non-blocking Unix sockets, which stay the caller's, until cancelled; then every connection is
        told so and closed."""
        try:
            async with anyio.create_task_group() as tasks:
                for listener in listeners:
                    tasks.start_soon(self._accept, listener, name="ferrum daemon listener")
                task_status.started()
                await self._check()
        finally:
            with anyio.CancelScope(shield=True):
                await self.close()

    def go_away(self, reason: str, drain_s: float) -> None:
        """Tell everybody that no new work is taken, and refuse whoever comes."""
        self._refusal = Cancelled(reason)
        for session in list(self._sessions):
            session.go_away(reason, drain_s)

    async def close(self) -> None:
        """End every connection: what is on its way to a client that reads still arrives."""
        self._refusal = self._refusal or Cancelled("the daemon is shutting down")
        for session in list(self._sessions):
            session.cut(self._refusal)
        with anyio.move_on_after(CLOSE_LIMIT_S):
            await self._wait_until_empty()
        for session in list(self._sessions):
            session.abort()
        await self._wait_until_empty()

    async def _wait_until_empty(self) -> None:
        while self._sessions:
            self._is_empty = anyio.Event()
            await self._is_empty.wait()

    async def _accept(self, listener: socket.socket) -> None:
        has_room = True
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                await anyio.wait_readable(listener)
            except ConnectionAbortedError:
                pass  # it has gone already
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if has_room:
                    _log.warning("no room for a connection", extra={"error": error.strerror})
                has_room = False
                await anyio.sleep(_RETRY_S)  # it stays in the queue
            else:
                has_room = True
                await self._open(connection)

    async def _open(self, connection: socket.socket) -> None:
        who = peer(connection)
        try:
            user = self._admit(who)
        except FerrumError as error:
            _log.warning("refused", extra={"uid": who.uid, "pid": who.pid, "code": error.code})
            _refuse(connection, error)
            await anyio.lowlevel.checkpoint()
            return
        connection.setblocking(False)
        session = Session(self._engine, user, self._limits, self._turns, self._lost)
        user.num_connections += 1
        _log.debug("connected", extra={"connection": session.number, "uid": who.uid, "pid": who.pid})
        try:
            # A turn of the loop or two; given up half-way, it would be hung up on without a word.
            with anyio.CancelScope(shield=True):
                await asyncio.get_running_loop().connect_accepted_socket(lambda: session, connection)
        except OSError as error:  # the event loop could not take it over
            connection.close()
            self._lost(session)
            _log.warning("lost", extra={"connection": session.number, "error": error.strerror})
            return
        if not session.is_lost:
            self._sessions.add(session)
        if self._refusal is not None:
            session.cut(self._refusal)

    def _admit(self, who: Peer) -> User:
        """Before a byte is read. Raises PermissionDenied, ResourceExhausted, or Cancelled while the daemon drains."""
        check_peer(who, self._allowed_uids)
        if self._refusal is not None:
            raise Cancelled(*self._refusal.args)
        if len(self._sessions) >= self._limits.connections:
            raise ResourceExhausted(f"{len(self._sessions)} connections are open, which is as many as the daemon takes")
        user = self._users.get(who.uid) or User(who.uid)
        if user.num_connections >= self._limits.user_connections:
            raise ResourceExhausted(f"uid {who.uid} has {user.num_connections} connections open, which is all that it may")
        self._users[who.uid] = user
        return user

    def _lost(self, session: Session) -> None:
        self._sessions.discard(session)
        session.user.num_connections -= 1
        self._forget_idle(session.user)
        if not self._sessions:
            self._is_empty.set()

    def _forget_idle(self, user: User) -> None:
        user.settle()
        if not (user.num_connections or user.num_requests):
            self._users.pop(user.uid, None)

    async def _check(self) -> None:
        while True:
            await anyio.sleep(_CHECK_EVERY_S)
            now = asyncio.get_running_loop().time()
            for session in list(self._sessions):
                session.check(now)
            for user in list(self._users.values()):
                self._forget_idle(user)


def _refuse(connection: socket.socket, error: FerrumError) -> None:
    """Say why, if that can be said at once, and hang up."""
    with connection:
        connection.setblocking(False)
        with suppress(OSError):  # it has gone already
            connection.send(encode(failure(error)))
