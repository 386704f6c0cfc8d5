"""Preempted sequences whose pages go to host memory, where bringing them back takes less time than computing them."""

from dataclasses import dataclass

from ferrum_rt.interfaces.errors import EngineFailed
from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.model_executor import PageSwap, StepInput
from ferrum_rt.runtime.cost_model import CostModel, StepWork
from ferrum_rt.runtime.pages import PagedKvCache
from ferrum_rt.runtime.sequence import Sequence

_BYTES_PER_S = 8e9  # before it is learnt: half of what PCIe 4.0 x16 gives
_LEARN = 0.2  # what a new measurement counts for
_LEAST_S = 1e-6


@dataclass(slots=True, eq=False)
class _Swapped:
    """The pages that hold a sequence's first ``num_tokens`` tokens, on the host."""

    pages: list[int]
    num_tokens: int


class Swapping:
    """``num_pages`` pages of host memory, of ``page_bytes`` bytes each like those on the device.

    A step carries out what was swapped while it was planned: first all that goes out, then all that comes in. So a host
    page that is read in a step can be written again only in a later one. What is ``arriving`` cannot be copied in the same
    step, for copies come before it.
    """

    def __init__(self, cache: PagedKvCache, costs: CostModel, *, num_pages: int, page_bytes: int) -> None:
        self.num_out = self.num_in = 0
        self.arriving: set[Sequence] = set()
        self.bytes_per_s = _BYTES_PER_S
        self._cache, self._costs = cache, costs
        self._total, self._page_bytes = num_pages, page_bytes
        self._free = list(range(num_pages - 1, -1, -1))
        self._swapped: dict[Sequence, _Swapped] = {}
        self._out: list[PageSwap] = []
        self._in: list[PageSwap] = []

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._swapped

    def swap_out(self, sequence: Sequence) -> None:
        """It is about to lose its pages: they are swapped, if they fit and it is worth it."""
        handle = sequence.handle
        if handle is None or not sequence.num_planned:
            return
        num_pages = self._cache.pages_for(sequence.num_planned)
        if num_pages > len(self._free) or not self._is_worth_it(sequence.num_planned, num_pages, handle):
            return
        pages = [self._free.pop() for _ in range(num_pages)]
        self._out += [PageSwap(page, host_page) for page, host_page in zip(handle.table.pages, pages, strict=False)]
        self._swapped[sequence] = _Swapped(pages, sequence.num_planned)
        self.num_out += num_pages

    def swap_in(self, sequence: Sequence, handle: KvCacheHandle) -> None:
        """It has pages again, some of which may hold what they are to hold already."""
        swapped = self._swapped.pop(sequence)
        self.arriving.add(sequence)
        first = handle.num_cached_tokens // self._cache.block_size
        pairs = list(zip(handle.table.pages, swapped.pages, strict=False))
        self._in += [PageSwap(page, host_page) for page, host_page in pairs[first:]]
        self.num_in += len(pairs[first:])
        self._free += swapped.pages[:first]
        handle.num_cached_tokens = max(handle.num_cached_tokens, swapped.num_tokens)

    def drop(self, sequence: Sequence) -> None:
        """What it has on the host is not wanted any more."""
        swapped = self._swapped.pop(sequence, None)
        if swapped is not None:
            gone = set(swapped.pages)
            self._out = [pair for pair in self._out if pair.host_page not in gone]
            self._free += swapped.pages

    def carry_out(self, step: StepInput) -> None:
        """With this step, whose planning is done."""
        step.swapped_out, step.swapped_in = self._out, self._in
        self._free += [pair.host_page for pair in self._in]
        self._out, self._in = [], []
        self.arriving.clear()

    def observe(self, num_pages: int, work: StepWork, step_s: float) -> None:
        """A step that swapped so many pages took so long: what it took beyond its other work was for them."""
        seconds = max(_LEAST_S, step_s - self._costs.predict(work))
        self.bytes_per_s += _LEARN * (num_pages * self._page_bytes / seconds - self.bytes_per_s)

    def verify(self) -> None:
        """Check the ledger of host pages; raises EngineFailed naming a page that is wrong."""
        held = [page for swapped in self._swapped.values() for page in swapped.pages]
        pages = sorted([*self._free, *held, *(pair.host_page for pair in self._in)])
        if pages != list(range(self._total)):
            wrong = next(page for page in range(self._total + 1) if pages.count(page) != (page < self._total))
            raise EngineFailed(f"host page ledger: page {wrong} is free, held and arriving {pages.count(wrong)} times")

    def _is_worth_it(self, num_tokens: int, num_pages: int, handle: KvCacheHandle) -> bool:
        """Coming back takes less time than computing what the prefix cache is not sure to have then."""
        missing = num_tokens - self._cache.num_shared_tokens(handle)
        recompute_s = self._costs.predict(StepWork(missing, 1, num_tokens)) if missing > 0 else 0.0
        return num_pages * self._page_bytes / self.bytes_per_s < recompute_s
