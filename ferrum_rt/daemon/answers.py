"""What the daemon answers at once: to queries, and to what is done to sessions."""

import os

import msgspec

from ferrum_rt.daemon.users import User
from ferrum_rt.interfaces.errors import FerrumError, PermissionDenied
from ferrum_rt.interfaces.requests import check_sessions
from ferrum_rt.interfaces.types import SessionId
from ferrum_rt.ipc.framing import MAX_FRAME_BYTES
from ferrum_rt.ipc.messages import EndSession, ForkSession, Query, Refused, Report
from ferrum_rt.runtime.runtime import Runtime

# An error may quote what a client sent.
MAX_FAILURE_LENGTH = 2000
_MAX_REPORT_BYTES = MAX_FRAME_BYTES - 1024


def answer(engine: Runtime, user: User, message: Query | EndSession | ForkSession) -> Report | Refused:
    """Raises nothing that the client could be the cause of."""
    try:
        content = _report(engine, user, message) if isinstance(message, Query) else _change(engine, user, message)
    except FerrumError as error:
        return Refused(query_id=message.query_id, code=error.code, message=str(error)[:MAX_FAILURE_LENGTH])
    return Report(query_id=message.query_id, content=content.decode())


def _report(engine: Runtime, user: User, query: Query) -> bytes:
    match query.kind:
        case "metrics":
            return msgspec.json.encode(engine.metrics())
        case "status":
            return msgspec.json.encode(engine.status_now())
        case "health":
            return msgspec.json.encode(engine.health_now())
        case "arrivals":
            _check_operator(user, "arrivals: they are")
            return _arrivals(engine)
        case "diagnostics":
            _check_operator(user, "diagnostics: they tell")
            return _diagnostics(engine)


def _check_operator(user: User, what: str) -> None:
    if user.uid != os.geteuid():
        raise PermissionDenied(f"{what} of all users, so only the one who runs the daemon is told of them")


def _arrivals(engine: Runtime) -> bytes:
    """Of the latest, as many as go into a frame: all, unless clients have very long names."""
    arrivals = engine.arrivals()
    while len(content := msgspec.json.encode(arrivals)) > _MAX_REPORT_BYTES:
        arrivals = engine.arrivals(len(arrivals) // 2)
    return content


def _diagnostics(engine: Runtime) -> bytes:
    """With as many clients as go into a frame, those with the most pages: all, unless thousands have very long names."""
    found = engine.diagnostics()
    clients = sorted(found.clients.items(), key=lambda item: item[1].num_pages, reverse=True)
    while len(content := msgspec.json.encode(found)) > _MAX_REPORT_BYTES:
        clients = clients[: len(clients) // 2]
        found = msgspec.structs.replace(found, clients=dict(clients))
    return content


def _change(engine: Runtime, user: User, message: EndSession | ForkSession) -> bytes:
    session_id, client_id = SessionId(message.session_id), user.client_id(message.client_id)
    if isinstance(message, EndSession):
        check_sessions(message.client_id, session_id=session_id)
        return msgspec.json.encode(engine.sessions().end(client_id, session_id))
    new_session_id = SessionId(message.new_session_id)
    check_sessions(message.client_id, session_id=session_id, new_session_id=new_session_id)
    engine.sessions().fork(client_id, session_id, new_session_id)
    return b"null"
