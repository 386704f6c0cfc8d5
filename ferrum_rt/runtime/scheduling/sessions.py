"""Sessions: what a request has computed stays, for the next request of the same session to go on from.

A session is a claim on pages, and the tokens that are in them. It stays as it was while a request goes on from it, and gives
way to what that request has computed only when it has ended well: what fails or is cancelled leaves no trace. When others
want the pages it may be swapped to the host, where it stays until it gives way.
"""

from collections import Counter
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from ferrum_rt.interfaces.config import SchedulerConfig
from ferrum_rt.interfaces.errors import EngineFailed, NotFound, RequestValidationError
from ferrum_rt.interfaces.kv_cache import KvCacheFork, KvCacheHandle
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import ClientId, RequestId, SessionId, TokenId
from ferrum_rt.runtime.scheduling.clients import Clients
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.sequence import Sequence
from ferrum_rt.runtime.scheduling.swapping import HostPages, Swapping

_Key = tuple[ClientId, SessionId]


@dataclass(slots=True, eq=False)
class Session:
    """All of ``tokens`` are computed in the pages of ``held``, which are kept in the pool, or on the host."""

    tokens: list[TokenId]
    held: KvCacheHandle | HostPages
    used_at: float


class Sessions:
    """Of all clients, by client and name, the least recently used first. ``now`` is the time of the last plan. Pages that
    the pool reclaims are swapped, or their sessions' end; so are host pages that are reclaimed."""

    def __init__(self, cache: PagedKvCache, swapping: Swapping, clients: Clients, config: SchedulerConfig) -> None:
        self.config = config
        self.now = 0.0
        self._cache, self._swapping, self._clients = cache, swapping, clients
        self._sessions: dict[_Key, Session] = {}
        self._keys: dict[KvCacheHandle | HostPages, _Key] = {}
        # What first samples have left that ended before others of their request.
        self._ended: dict[RequestId, tuple[list[TokenId], KvCacheHandle]] = {}
        cache.on_reclaim = self._swap_out
        swapping.on_reclaim = self._lost

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
        held = session.held
        too = self._swapping.keep_too(held) if isinstance(held, HostPages) else self._cache.keep_too(held)
        self._put((client_id, new_session_id), Session(session.tokens, too, self.now))

    # -- for the scheduler --------------------------------------------------------------------------------------------

    def resume(self, request: SequenceRequest, tokens: Tokens[TokenId], num_hits: int) -> KvCacheFork | None:
        """Pages for a sequence that goes on from its session, with room for all its tokens; at least one of them is left to
        compute. None if the session has no more of them than the ``num_hits`` that are to be had without it, if it has them
        on the host (see ``bring_back``), or if too few pages are free."""
        key = _key_of(request)
        session = None if key is None else self._sessions.get(key)
        if key is None or session is None:
            return None
        num_common = _num_reusable(session, tokens)
        if num_common <= num_hits:
            return None
        if isinstance(session.held, HostPages):
            self._swapping.use(session.held)  # it is not to make room for those whose pages the sequence gets now
            return None
        fork = self._cache.resume(session.held, request.request_id, num_common, room=len(tokens))
        if fork is not None:
            self._use(key)
        return fork

    def bring_back(self, sequence: Sequence, handle: KvCacheHandle) -> None:
        """These are the pages of a sequence that goes on from its session. If that is on the host, what they have in common
        comes to the pages, and stays with the session too."""
        key = _key_of(sequence.request)
        session = None if key is None else self._sessions.get(key)
        if key is None or session is None or not isinstance(session.held, HostPages):
            return
        num_common = _num_reusable(session, sequence.tokens)
        if num_common > handle.num_cached_tokens:
            self._cache.count_hit(num_common - handle.num_cached_tokens)
            self._swapping.read(sequence, handle, session.held, num_common)
            self._use(key)

    def take(self, sequence: Sequence, handle: KvCacheHandle) -> None:
        """A sequence has ended well, and these were its pages: a session has them now, once its request has ended, or
        nobody."""
        request = sequence.request
        if request.session_id is None or sequence.index or not handle.num_computed:
            self._cache.deallocate(handle)
            return
        self._cache.keep(handle)
        self._ended[request.request_id] = sequence.tokens[: handle.num_computed], handle

    def settle(self, request: SequenceRequest) -> None:
        """All samples of the request have ended."""
        key, ended = _key_of(request), self._ended.pop(request.request_id, None)
        if key is None or ended is None or not ended[1].table.pages:
            return
        if (former := self._sessions.get(key)) is not None:
            self._give_up(former)
        self._put(key, Session(*ended, self.now))

    def drop(self, request_id: RequestId) -> None:
        """The request has not ended well: what its samples have left so far goes too."""
        _, handle = self._ended.pop(request_id, (None, None))
        if handle is not None and handle.table.pages:
            self._cache.give_up(handle)

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

    def verify(self) -> None:
        """Check that each session has its pages, and that nothing else is kept for one; raises EngineFailed."""
        for key, session in self._sessions.items():
            pages = session.held.pages if isinstance(session.held, HostPages) else session.held.table.pages
            if self._keys.get(session.held) != key or len(pages) != self._cache.pages_for(len(session.tokens)):
                raise EngineFailed(f"session ledger: {key} has {len(pages)} pages for {len(session.tokens)} tokens")
        if len(self._keys) != len(self._sessions):
            raise EngineFailed(f"session ledger: {len(self._keys)} claims on pages for {len(self._sessions)} sessions")

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _put(self, key: _Key, session: Session) -> None:
        self._sessions[key] = session
        self._keys[session.held] = key
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
        """To the client's share of the pages, together with what its requests hold; those on the host have none."""
        share = self._clients.policy(client_id).max_page_share
        if share >= 1:
            return
        held = self._clients[client_id].num_pages if client_id in self._clients else 0
        own = [session.held for key, session in self._sessions.items() if key[0] == client_id]
        resident = [handle for handle in own if isinstance(handle, KvCacheHandle)]
        for handle in resident:
            if held + self._cache.num_kept_alone(resident) <= share * self._cache.num_pages:
                return
            self._lost(handle)
            self._cache.give_up(handle)

    def _use(self, key: _Key) -> None:
        """If it has not just been given up for want of pages."""
        session = self._sessions.pop(key, None)
        if session is not None:
            self._sessions[key] = session
            session.used_at = self.now

    def _give_up(self, session: Session) -> None:
        held = session.held
        self._lost(held)
        if isinstance(held, HostPages):
            self._swapping.give_up(held)
        else:
            self._cache.give_up(held)

    def _swap_out(self, handle: KvCacheHandle) -> None:
        """The pool is about to take these pages."""
        key = self._keys.get(handle)
        if key is None:
            return
        kept = self._swapping.keep(handle)
        if kept is None:
            self._lost(handle)
            return
        del self._keys[handle]
        self._sessions[key].held = kept
        self._keys[kept] = key

    def _lost(self, held: KvCacheHandle | HostPages) -> None:
        key = self._keys.pop(held, None)
        if key is not None:
            del self._sessions[key]


def _key_of(request: SequenceRequest) -> _Key | None:
    return None if request.session_id is None else (request.client_id, request.session_id)


def _num_reusable(session: Session, tokens: Tokens[TokenId]) -> int:
    """Of these tokens, those that the session has; at least the last is left to compute."""
    return min(_num_common(session.tokens, tokens), len(tokens) - 1)


def _num_common(one: Tokens[TokenId], other: Tokens[TokenId]) -> int:
    """How many tokens the two have in common at their start."""
    if one == other[: len(one)]:  # as it mostly is, and in one comparison
        return len(one)
    return next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))
