"""Pages that go to host memory, those of preempted sequences and of sessions, where bringing them back takes less time than
computing them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ferrum_rt.interfaces.errors import EngineFailed
from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.model_executor import PageSwap, StepInput
from ferrum_rt.runtime.scheduling.cost_model import CostModel, StepWork
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.sequence import Sequence

_BYTES_PER_S = 8e9  # before it is learnt: half of what PCIe 4.0 x16 gives
_LEARN = 0.2  # what a new measurement counts for
_LEAST_S = 1e-6


@dataclass(slots=True, eq=False)
class HostPages:
    """A claim on the host pages that hold the first ``num_tokens`` tokens of a sequence or a session."""

    pages: list[int]
    num_tokens: int


class Swapping:
    """``num_pages`` pages of host memory, of ``page_bytes`` bytes each like those on the device.

    A step carries out what was swapped while it was planned: first all that goes out, then all that comes in. So a host
    page that is read in a step can be written again only in a later one. What is ``arriving`` cannot be copied in the same
    step, for copies come before it. What is kept for sessions makes room for who is preempted, and for other sessions:
    ``on_reclaim`` hears of it just before it is lost.
    """

    def __init__(self, cache: PagedKvCache, costs: CostModel, *, num_pages: int, page_bytes: int) -> None:
        self.num_out = self.num_in = 0
        self.arriving: set[Sequence] = set()
        self.bytes_per_s = _BYTES_PER_S
        self.on_reclaim: Callable[[HostPages], None] = lambda kept: None
        self._cache, self._costs = cache, costs
        self._page_bytes = page_bytes
        self._free = list(range(num_pages - 1, -1, -1))
        self._claims = [0] * num_pages
        self._swapped: dict[Sequence, HostPages] = {}
        self._kept: dict[HostPages, None] = {}  # least recently used first
        self._out: list[PageSwap] = []
        self._in: list[PageSwap] = []

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._swapped

    # -- sequences ----------------------------------------------------------------------------------------------------

    def swap_out(self, sequence: Sequence) -> None:
        """It is about to lose its pages: they are swapped, if they fit and it is worth it."""
        if sequence.handle is not None and sequence.num_planned:
            swapped = self._send(sequence.handle, sequence.num_planned)
            if swapped is not None:
                self._swapped[sequence] = swapped

    def swap_in(self, sequence: Sequence, handle: KvCacheHandle) -> None:
        """It has pages again, some of which may hold what they are to hold already."""
        swapped = self._swapped.pop(sequence)
        self._fetch(sequence, handle, swapped, swapped.num_tokens)
        self._let_go(swapped)

    def drop(self, sequence: Sequence) -> None:
        """What it has on the host is not wanted any more."""
        swapped = self._swapped.pop(sequence, None)
        if swapped is not None:
            self._let_go(swapped)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def keep(self, handle: KvCacheHandle) -> HostPages | None:
        """What is computed in a session's pages, which it is about to lose; None if it does not fit or is not worth it."""
        kept = self._send(handle, handle.num_computed)
        if kept is not None:
            self._kept[kept] = None
        return kept

    def keep_too(self, kept: HostPages) -> HostPages:
        """A second claim on the same pages, kept as well."""
        for page in kept.pages:
            self._claims[page] += 1
        too = HostPages(kept.pages, kept.num_tokens)
        self._kept[too] = None
        return too

    def use(self, kept: HostPages) -> None:
        """It is the last now to make room for others."""
        self._kept[kept] = self._kept.pop(kept)

    def read(self, sequence: Sequence, handle: KvCacheHandle, kept: HostPages, num_tokens: int) -> None:
        """Bring the first of the tokens to a sequence's pages, some of which may hold them already. They stay kept."""
        self._fetch(sequence, handle, kept, num_tokens)

    def give_up(self, kept: HostPages) -> None:
        """It is kept no longer."""
        del self._kept[kept]
        self._let_go(kept)

    # -- the step -----------------------------------------------------------------------------------------------------

    def carry_out(self, step: StepInput) -> None:
        """With this step, whose planning is done."""
        step.swapped_out, step.swapped_in = self._out, self._in
        self._free += [page for page in self._read() if not self._claims[page]]
        self._out, self._in = [], []
        self.arriving.clear()

    def observe(self, num_pages: int, work: StepWork, step_s: float) -> None:
        """A step that swapped so many pages took so long: what it took beyond its other work was for them."""
        seconds = max(_LEAST_S, step_s - self._costs.predict(work))
        self.bytes_per_s += _LEARN * (num_pages * self._page_bytes / seconds - self.bytes_per_s)

    def verify(self) -> None:
        """Check the ledger of host pages; raises EngineFailed naming a page that is wrong."""
        claims = Counter(page for held in (*self._swapped.values(), *self._kept) for page in held.pages)
        read, free = self._read(), Counter(self._free)
        for page, counted in enumerate(self._claims):
            is_held = claims[page] > 0 or page in read
            if claims[page] != counted or is_held + free[page] != 1:
                raise EngineFailed(
                    f"host page ledger: page {page} is held by {claims[page]}, counted {counted}, read: {page in read}, and "
                    f"free {free[page]} times"
                )

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _send(self, handle: KvCacheHandle, num_tokens: int) -> HostPages | None:
        num_pages = self._cache.pages_for(num_tokens)
        if not self._is_worth_it(num_tokens, num_pages, handle) or not self._make_room(num_pages):
            return None
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._claims[page] = 1
        self._out += [PageSwap(page, host_page) for page, host_page in zip(handle.table.pages, pages, strict=False)]
        self.num_out += num_pages
        return HostPages(pages, num_tokens)

    def _fetch(self, sequence: Sequence, handle: KvCacheHandle, held: HostPages, num_tokens: int) -> None:
        self.arriving.add(sequence)
        wanted = slice(handle.num_cached_tokens // self._cache.block_size, self._cache.pages_for(num_tokens))
        pairs = list(zip(handle.table.pages[wanted], held.pages[wanted], strict=True))
        self._in += [PageSwap(page, host_page) for page, host_page in pairs]
        self.num_in += len(pairs)
        handle.num_cached_tokens = max(handle.num_cached_tokens, num_tokens)

    def _make_room(self, num_pages: int) -> bool:
        """So many free pages; False, with nothing changed, if even those of sessions would be too few."""
        if num_pages > len(self._free):
            kept = {page for held in self._kept for page in held.pages}
            if num_pages > len(self._free) + len(kept - self._read()):
                return False
        while num_pages > len(self._free):
            oldest = next(iter(self._kept))
            self.on_reclaim(oldest)
            self.give_up(oldest)
        return True

    def _let_go(self, held: HostPages) -> None:
        read = self._read()
        for page in held.pages:
            self._claims[page] -= 1
        gone = [page for page in held.pages if not self._claims[page] and page not in read]
        self._free += gone
        self._out = [pair for pair in self._out if pair.host_page not in gone]

    def _read(self) -> set[int]:
        """Host pages that the step being planned reads: if nobody holds them, they are free in the next."""
        return {pair.host_page for pair in self._in}

    def _is_worth_it(self, num_tokens: int, num_pages: int, handle: KvCacheHandle) -> bool:
        """Coming back takes less time than computing what the prefix cache is not sure to have then."""
        missing = num_tokens - self._cache.num_shared_tokens(handle)
        recompute_s = self._costs.predict(StepWork(missing, 1, num_tokens)) if missing > 0 else 0.0
        return num_pages * self._page_bytes / self.bytes_per_s < recompute_s
