"""Schedulers and pools with a bug, each as somebody might write it, for the simulation to find."""

from collections.abc import Container
from itertools import count
from typing import Any

import msgspec

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.kv_cache import KvCacheFork, KvCacheHandle
from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.sampler import SampledToken
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import ClientId, RequestId, TokenId
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.planned import Entry
from ferrum_rt.runtime.scheduling.roster import Roster
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.scheduling.sequence import Sequence, SequenceState
from ferrum_rt.runtime.scheduling.sessions import Session, Sessions
from ferrum_rt.runtime.scheduling.swapping import HostPages, Swapping
from ferrum_rt.runtime.scheduling.trials import Trials
from ferrum_rt.runtime.scheduling.waiting import WaitingQueue


class DoubleFree(PagedKvCache):
    """A shared page is given back once too often."""

    def deallocate(self, handle: KvCacheHandle) -> None:
        shared = [page for page in handle.table.pages if self._refcounts[page] > 1]
        super().deallocate(handle)
        for page in shared[:1]:
            self._release(page)


class LostCancel(UnifiedScheduler):
    """A request whose token is under way is told that it is cancelled, and is not."""

    def cancel(self, request_id: RequestId, index: int | None = None) -> bool:
        if any(sequence.num_pending for sequence in self._roster.samples(request_id)):
            return True
        return super().cancel(request_id, index)


class PublishBeforeCommit(UnifiedScheduler):
    """Pages can be hit as soon as the step that is to write them is planned."""

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        plan = super().plan(hint)
        if plan is not None:
            for entry in self._in_flight[-1][1]:
                if entry.sequence.handle is entry.handle:
                    self._cache.publish(entry.handle, entry.sequence.tokens, min(entry.end, len(entry.sequence.tokens)))
        return plan


class WithParts(UnifiedScheduler):
    """One with parts of another type."""

    swapping_type: type[Swapping] = Swapping
    sessions_type: type[Sessions] = Sessions
    roster_type: type[Roster] = Roster

    def __init__(self, cache: PagedKvCache, **fields: Any) -> None:
        super().__init__(cache, **fields)
        num_host_pages, page_bytes = fields["num_host_pages"], fields["page_bytes"]
        self.swapping = self.swapping_type(cache, self._pace.costs, num_pages=num_host_pages, page_bytes=page_bytes)
        self.sessions = self.sessions_type(cache, self.swapping, self._clients, fields["config"])
        self._roster = self.roster_type(self._clients, self._waiting, self._residents, self.sessions, self.swapping)


class _LeakyRoster(Roster):
    def _leave(self, sequence: Sequence) -> None:
        if sequence.state is not SequenceState.PARKED:
            super()._leave(sequence)


class LeakedParked(WithParts):
    """A parked sequence that ends stays among the parked."""

    roster_type = _LeakyRoster


class SwallowedToken(UnifiedScheduler):
    """The token that was under way when its sequence was preempted is not passed on."""

    def _append(self, sequence: Sequence, token_id: TokenId, sampled: SampledToken, update: SequenceUpdate) -> None:
        was_preempted = sequence.handle is None
        super()._append(sequence, token_id, sampled, update)
        if was_preempted:
            update.token_ids.clear()


class UnchainedDigests(PagedKvCache):
    """A page is found by its own tokens, whatever stands before it."""

    def _chain(self, digest: bytes, tokens: bytes) -> bytes:
        return super()._chain(b"", tokens)


class _BlindRoster(Roster):
    is_expiring = False

    def live(self, request: SequenceRequest) -> list[Sequence]:
        live = super().live(request)
        return [one for one in live if one.state is not SequenceState.PARKED] if self.is_expiring else live


class DeafToParkedDeadlines(WithParts):
    """A parked request outlives its deadline."""

    roster_type = _BlindRoster
    _roster: _BlindRoster

    def expire(self, now: float) -> list[SequenceUpdate]:
        self._roster.is_expiring = True
        updates = super().expire(now)
        self._roster.is_expiring = False
        return updates


class WrongCulprit(UnifiedScheduler):
    """Whoever stands first in the running batch pays for an error."""

    def _fail(self, request: SequenceRequest, error: FerrumError) -> SequenceUpdate:
        running = self._residents.running
        return super()._fail(running[0].request if running else request, error)


class OverBudget(UnifiedScheduler):
    """A step has a token more than it may."""

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        return super().plan(msgspec.structs.replace(hint, max_tokens=hint.max_tokens + 1))


class LongMemory(UnifiedScheduler):
    """Every request's name is kept for ever."""

    def __init__(self, cache: PagedKvCache, **fields: Any) -> None:
        super().__init__(cache, **fields)
        self._seen: set[RequestId] = set()

    def submit(self, request: SequenceRequest) -> None:
        super().submit(request)
        self._seen.add(request.request_id)


class Moody(UnifiedScheduler):
    """Now and then a step is left out, by how many were ever planned in this process."""

    _planned = count()

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        return None if next(self._planned) % 7 == 0 and self._in_flight else super().plan(hint)


class UnknownName(UnifiedScheduler):
    """A request that has ended cannot be cancelled without a crash."""

    def cancel(self, request_id: RequestId, index: int | None = None) -> bool:
        return bool(self._roster.sequences[request_id]) and super().cancel(request_id, index)


class _MostServedFirst(WaitingQueue):
    def first(self, without: Container[ClientId] = ()) -> Sequence | None:
        for own in self._classes.values():
            for _, client_id in reversed(own.order):
                if client_id not in without:
                    return own.queues[client_id][-1][1]
        return None


class UnfairTie(UnifiedScheduler):
    """Of the clients that wait, the one that was served most is next."""

    def __init__(self, cache: PagedKvCache, **fields: Any) -> None:
        super().__init__(cache, **fields)
        self._waiting = _MostServedFirst(self._clients, self._waiting.ageing_steps)
        self._roster = Roster(self._clients, self._waiting, self._residents, self.sessions, self.swapping)


class BlamesEverybody(UnifiedScheduler):
    """All that were in a step that failed end with it."""

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        entries = self._landed(plan).entries
        live = {entry.sequence.request.request_id: entry.sequence.request for entry in entries if not entry.is_lost}
        return [self._fail(request, error) for request in live.values()]


class EndlessTrials(UnifiedScheduler):
    """The requests of a step that failed are tried together again, however often."""

    def __init__(self, cache: PagedKvCache, **fields: Any) -> None:
        super().__init__(cache, **fields)
        self._trials = _Unsplit()


class _Unsplit(Trials):
    def split(self, requests: list[list[Sequence]]) -> None:
        super().split([[sequence for samples in requests for sequence in samples]])


class NeverCopied(PagedKvCache):
    """A session's last page is shared with whoever goes on from there, though a fork has it too."""

    def resume(self, kept: KvCacheHandle, request_id: RequestId, num_tokens: int, room: int) -> KvCacheFork | None:
        pages, num_shared = kept.table.pages, num_tokens // self.block_size
        if num_tokens % self.block_size and pages[num_shared] not in self._published:
            num_shared += 1
        return self._share(kept, request_id, num_tokens, room, num_shared)


class _KeepingRoster(Roster):
    def finish(self, sequence: Sequence, *, ends_well: bool = False) -> None:
        handle = sequence.handle
        if handle is not None and sequence.request.session_id is not None:
            handle.num_computed = min(sequence.num_planned, len(sequence.tokens))
        super().finish(sequence, ends_well=True)


class KeepsWhatFailed(WithParts):
    """A session has what was planned for its request, be it computed or not."""

    roster_type = _KeepingRoster


class _LavishRoster(Roster):
    def finish(self, sequence: Sequence, *, ends_well: bool = False) -> None:
        swapped = self._swapping._swapped.get(sequence)
        super().finish(sequence, ends_well=ends_well)
        if swapped is not None:
            self._swapping._free += swapped.pages


class HostPageFreedTwice(WithParts):
    """What a sequence that ends had on the host is given back once more than it was taken."""

    roster_type = _LavishRoster


class CopiedBeforeItArrives(UnifiedScheduler):
    """A sample shares the pages of one that comes back from the host in the same step, in which copies come first."""

    def _admit(self, sequence: Sequence, step: StepInput, entries: list[Entry]) -> bool:
        is_admitted = super()._admit(sequence, step, entries)
        self.swapping.arriving.clear()
        return is_admitted


class _HastySwapping(Swapping):
    def _read(self) -> set[int]:
        return set()


class HostPageFreedTooEarly(WithParts):
    """What is read from the host in a step may be written there in the same step, in which going out comes first."""

    swapping_type = _HastySwapping


class _CarelessSwapping(Swapping):
    def read(self, sequence: Sequence, handle: KvCacheHandle, kept: HostPages, num_tokens: int) -> None:
        super().read(sequence, handle, kept, num_tokens)
        self._in.pop()


class LastPageLeftBehind(WithParts):
    """A session comes back from the host without its last page."""

    swapping_type = _CarelessSwapping


class _HoardingSessions(Sessions):
    def _give_up(self, session: Session) -> None:
        if isinstance(session.held, HostPages):
            self._lost(session.held)
        else:
            super()._give_up(session)


class HostPagesOutliveSessions(WithParts):
    """A session that ends leaves its pages on the host."""

    sessions_type = _HoardingSessions
