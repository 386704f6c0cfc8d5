"""Sessions: what a request has computed stays, for the next request of the same session to go on from.

A session is a claim on pages, and the tokens that are in them. It stays as it was while a request goes on from it, and gives
way to what that request has computed only when it has ended well: what fails or is cancelled leaves no trace.
"""

from collections import Counter
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from ferrum_rt.interfaces.config import SchedulerConfig
from ferrum_rt.interfaces.errors import NotFound, RequestValidationError
from ferrum_rt.interfaces.kv_cache import KvCacheFork, KvCacheHandle
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import ClientId, RequestId, SessionId, TokenId
from ferrum_rt.runtime.clients import Clients
from ferrum_rt.runtime.pages import PagedKvCache
from ferrum_rt.runtime.sequence import Sequence

_Key = tuple[ClientId, SessionId]


@dataclass(slots=True, eq=False)
class _Session:
    """``handle`` is kept in the pool; all of ``tokens`` are computed in its pages."""

    tokens: list[TokenId]
    handle: KvCacheHandle
    used_at: float


class Sessions:
    """Of all clients, by client and name, the least recently used first. ``now`` is the time of the last plan. Pages that
    the pool reclaims are their sessions' end."""

    def __init__(self, cache: PagedKvCache, clients: Clients, config: SchedulerConfig, *, num_pages: int) -> None:
        self.config = config
        self.now = 0.0
        self._cache, self._clients, self._num_pages = cache, clients, num_pages
        self._sessions: dict[_Key, _Session] = {}
        self._keys: dict[KvCacheHandle, _Key] = {}
        self._ended: dict[RequestId, _Session] = {}  # first samples that ended before others of their request
        cache.on_reclaim = self._lost

    def __len__(self) -> int:
        return len(self._sessions)

    # -- for callers --------------------------------------------------------------------------------------------------

    def end(self, client_id: ClientId, session_id: SessionId) -> bool:
        """Give up what a session has; False if there is no such session. A request under way may begin it anew."""
        session = self._sessions.get((client_id, session_id))
        if session is not None:
            self._give_up(session)
        return session is not None

    def fork(self, client_id: ClientId, session_id: SessionId, new_session_id: SessionId) -> None:
        """Another session with the same pages. Raises NotFound where there is nothing to share, and RequestValidationError
        for a name that is taken."""
        session = self._sessions.get((client_id, session_id))
        if session is None:
            raise NotFound(f"session_id: client {client_id!r} has no session {session_id!r} (any more)")
        if (client_id, new_session_id) in self._sessions:
            raise RequestValidationError(f"new_session_id: there is a session {new_session_id!r} already; end it first")
        fork = _Session(session.tokens, self._cache.keep_too(session.handle), self.now)
        self._put((client_id, new_session_id), fork)

    # -- for the scheduler --------------------------------------------------------------------------------------------

    def resume(self, request: SequenceRequest, tokens: Tokens[TokenId], num_hits: int) -> KvCacheFork | None:
        """Pages for a sequence that goes on from its session, with room for all its tokens; at least one of them is left to
        compute. None if the session has no more of them than the ``num_hits`` that are to be had without it, or if too few
        pages are free."""
        key = _key_of(request)
        session = None if key is None else self._sessions.get(key)
        if key is None or session is None:
            return None
        num_common = min(_num_common(session.tokens, tokens), len(tokens) - 1)
        if num_common <= num_hits:
            return None
        fork = self._cache.resume(session.handle, request.request_id, num_common, room=len(tokens))
        if fork is not None and key in self._sessions:
            self._sessions[key] = self._sessions.pop(key)
            session.used_at = self.now
        return fork

    def take(self, sequence: Sequence, handle: KvCacheHandle) -> None:
        """A sequence has ended well, and these were its pages: a session has them now, once its request has ended, or
        nobody."""
        request = sequence.request
        if request.session_id is None or sequence.index or not handle.num_computed:
            self._cache.deallocate(handle)
            return
        self._cache.keep(handle)
        self._ended[request.request_id] = _Session(sequence.tokens[: handle.num_computed], handle, self.now)

    def settle(self, request: SequenceRequest) -> None:
        """All samples of the request have ended."""
        key, session = _key_of(request), self._ended.pop(request.request_id, None)
        if key is None or session is None or not session.handle.table.pages:
            return
        if (former := self._sessions.get(key)) is not None:
            self._give_up(former)
        self._put(key, session)

    def drop(self, request_id: RequestId) -> None:
        """The request has not ended well: what its samples have left so far goes too."""
        session = self._ended.pop(request_id, None)
        if session is not None and session.handle.table.pages:
            self._cache.give_up(session.handle)

    def expire(self, now: float) -> None:
        """Give up those that nobody has used for too long."""
        self.now = max(self.now, now)
        while self._sessions and (due := self.next_expiry()) is not None and due <= now:
            self._give_up(next(iter(self._sessions.values())))

    def next_expiry(self) -> float | None:
        """When ``expire`` has something to do."""
        first = next(iter(self._sessions.values()), None)
        return None if first is None else first.used_at + self.config.session_ttl_s

    def reconfigure(self, config: SchedulerConfig) -> None:
        """From now on."""
        self.config = config
        self._trim()

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _put(self, key: _Key, session: _Session) -> None:
        session.used_at = self.now
        self._sessions[key] = session
        self._keys[session.handle] = key
        self._trim()
        self._trim_client(key[0])

    def _trim(self) -> None:
        """The client with the most sessions gives up those it has not used for longest: who forks without end pushes nobody
        else's out."""
        while len(self._sessions) > self.config.max_sessions:
            counts = Counter(client_id for client_id, _ in self._sessions)
            most = max(counts.values())
            self._give_up(next(session for key, session in self._sessions.items() if counts[key[0]] == most))

    def _trim_client(self, client_id: ClientId) -> None:
        """To the client's share of the pages, together with what its requests hold."""
        share = self._clients.policy(client_id).max_page_share
        if share >= 1:
            return
        held = self._clients[client_id].num_pages if client_id in self._clients else 0
        own = [session for key, session in self._sessions.items() if key[0] == client_id]
        for session in own:
            if held + self._cache.num_kept_alone(other.handle for other in own) <= share * self._num_pages:
                return
            self._give_up(session)

    def _give_up(self, session: _Session) -> None:
        self._lost(session.handle)
        self._cache.give_up(session.handle)

    def _lost(self, handle: KvCacheHandle) -> None:
        key = self._keys.pop(handle, None)
        if key is not None:
            del self._sessions[key]


def _key_of(request: SequenceRequest) -> _Key | None:
    return None if request.session_id is None else (request.client_id, request.session_id)


def _num_common(one: Tokens[TokenId], other: Tokens[TokenId]) -> int:
    """How many tokens the two have in common at their start."""
    if one == other[: len(one)]:  # as it mostly is, and in one comparison
        return len(one)
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))
