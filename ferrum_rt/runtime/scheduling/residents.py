"""Who has a slot and pages, for whom they are, and who is to give them back first."""

from bisect import insort

from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.runtime.scheduling.clients import Clients
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.sequence import Sequence

_MAX_STARTS = 4  # of a sequence; then it makes way for nobody any more


class Residents:
    """``running`` are those that take part in steps, most urgent first; parked ones may keep what they have beside them."""

    def __init__(self, cache: PagedKvCache, clients: Clients, *, num_slots: int) -> None:
        self.running: list[Sequence] = []
        self._cache, self._clients = cache, clients
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def settle(self, sequence: Sequence, handle: KvCacheHandle) -> int:
        """Give it a slot, which is returned, and these pages."""
        slot = self._free_slots.pop()
        sequence.start(slot, handle)
        client = self._clients[sequence.request.client_id]
        client.num_running += 1
        client.num_pages += len(handle.table.pages)
        return slot

    def join(self, sequence: Sequence) -> None:
        """It takes part in steps."""
        insort(self.running, sequence, key=lambda other: other.urgency)

    def grow(self, sequence: Sequence, handle: KvCacheHandle, num_tokens: int) -> bool:
        """Room for so many tokens; False if too few pages are free."""
        before = len(handle.table.pages)
        if not self._cache.extend(handle, num_tokens):
            return False
        self._clients[sequence.request.client_id].num_pages += len(handle.table.pages) - before
        return True

    def release(self, sequence: Sequence) -> None:
        """Slot and pages are free again, if it has any."""
        handle = self.leave(sequence)
        if handle is not None:
            self._cache.deallocate(handle)

    def leave(self, sequence: Sequence) -> KvCacheHandle | None:
        """Its slot is free again, if it has one; what becomes of the pages, which are returned, is the caller's care."""
        slot, handle = sequence.slot, sequence.handle
        if slot is None or handle is None:
            return None
        client = self._clients[sequence.request.client_id]
        client.num_running -= 1
        client.num_pages -= len(handle.table.pages)
        self._free_slots.append(slot)
        sequence.stop()
        return handle

    def has_room_for(self, waiting: Sequence) -> bool:
        """Whether there are a slot and pages, even if it finds none of them in the cache."""
        return self.has_free_slot and self._cache.num_available >= self._cache.pages_for(waiting.length)

    def would_take_too_much(self, waiting: Sequence) -> bool:
        """Its client's requests would hold more pages than the client's policy says; one of them may always run."""
        client = self._clients[waiting.request.client_id]
        limit = client.policy.max_page_share * self._cache.num_pages
        return client.num_running > 0 and client.num_pages + self._cache.pages_for(waiting.length) > limit

    def less_entitled(self, waiting: Sequence) -> Sequence | None:
        """A running sequence of a lower priority; else of a client with more than its share of those who run, if the one who
        waits has less. The last that came goes first. Having waited protects who runs, and takes nothing from others."""
        request, num_running = waiting.request, len(self.running)
        mine = self._clients[request.client_id]
        has_less = mine.num_running + 1 <= self._clients.share(request.client_id, num_running)
        best: tuple[int, float, int] | None = None
        victim = None
        for sequence in self.running:
            other = sequence.request
            if sequence.num_starts >= _MAX_STARTS or sequence.priority > request.priority:
                continue
            surplus = self._clients[other.client_id].num_running - 1 - self._clients.share(other.client_id, num_running)
            if sequence.priority < request.priority or (has_less and surplus >= 0):
                rank = (-sequence.priority, surplus, sequence.arrival)
                if best is None or rank > best:
                    best, victim = rank, sequence
        return victim
