"""The page ledger and the prefix cache. Synchronous; knows page numbers and token ids, never a tensor.

Every page is in one of three states: *free*; *active*, held by the tables of ``refcount`` live sequences; or *cached*: held
by no live sequence, but kept by a session, or published under the digest of its tokens. Cached pages can be had at any
time: first those that nobody keeps, least recently used first, then all that is kept under one handle, likewise.

A page's digest is keyed with a secret of this process and chained: it covers every token before the page too, and the
salt that says who may share it. A hit also compares the tokens themselves.
"""

import hashlib
import secrets
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Tokens

import msgspec

from ferrum_rt.interfaces.errors import EngineFailed
from ferrum_rt.interfaces.kv_cache import AllocationRequest, BlockTable, CacheHandleStats, KvCacheFork, KvCacheHandle
from ferrum_rt.interfaces.types import MemoryPressure, PageCounts, RequestId, TokenId

_PRESSURE_FROM = (0.70, 0.85, 0.95)  # shares that are active from which the pressure is moderate, high and critical


class _Published(msgspec.Struct, frozen=True):
    digest: bytes
    tokens: bytes


class PagedKvCache:
    """The KvCacheManager: ``num_pages`` pages of ``block_size`` tokens. ``on_reclaim`` hears of kept handles whose pages are
    needed, just before they lose them."""

    def __init__(self, num_pages: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.num_pages = num_pages
        self._prefix_caching = prefix_caching
        self._key = secrets.token_bytes(32)
        self._free = list(range(num_pages - 1, -1, -1))
        self._refcounts = [0] * num_pages
        self._num_active = 0
        self._handles: set[KvCacheHandle] = set()
        self._published: dict[int, _Published] = {}
        self._by_digest: dict[bytes, int] = {}
        self._cached: dict[int, None] = {}  # least recently used first
        self._kept: dict[KvCacheHandle, None] = {}  # likewise
        self._keepers = [0] * num_pages  # how many of these hold each page
        self._num_kept = 0  # pages that nobody else holds
        self.on_reclaim: Callable[[KvCacheHandle], None] = lambda handle: None
        self._hit_tokens = 0

    @property
    def num_available(self) -> int:
        """Pages that can be had now, by taking a free one or a cached one."""
        return len(self._free) + len(self._cached) + self._num_kept

    @property
    def pressure(self) -> MemoryPressure:
        """How much of it all is active."""
        share = self._num_active / self.num_pages
        return MemoryPressure(bisect_right(_PRESSURE_FROM, share))

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, request: AllocationRequest) -> KvCacheHandle | None:
        """Claim the longest published prefix and room for the rest; None, with nothing changed, if too few pages are free.

        At least one token is always left to compute: its logits are what the caller is after.
        """
        pages, digests = self._match(request)
        needed = self.pages_for(request.num_tokens) - len(pages)
        hits = len(pages)
        if not self._claim(pages, needed):
            return None
        self._hit_tokens += hits * self.block_size
        handle = KvCacheHandle(
            request_id=request.request_id,
            table=BlockTable(pages),
            num_cached_tokens=hits * self.block_size,
            digests=digests,
        )
        self._handles.add(handle)
        return handle

    def num_hits(self, request: AllocationRequest) -> int:
        """Tokens that ``allocate`` would find published."""
        return len(self._match(request)[0]) * self.block_size

    def fork(self, handle: KvCacheHandle, num_tokens: int, room: int) -> KvCacheFork | None:
        """Claim the handle's first ``num_tokens`` tokens too, with room for ``room`` in all; None, with nothing changed, if
        too few pages are free. Only full pages are shared: whoever goes on in one writes to it."""
        return self._share(handle, handle.request_id, num_tokens, room, num_tokens // self.block_size)

    def resume(self, kept: KvCacheHandle, request_id: RequestId, num_tokens: int, room: int) -> KvCacheFork | None:
        """As ``fork``, of a handle that is kept, for a request that goes on from there; it is a hit. A last page that is not
        full is shared too, if nobody else holds it or could hit it, and all that it has is wanted."""
        num_shared = num_tokens // self.block_size
        if num_tokens % self.block_size and num_tokens == kept.num_computed:
            page = kept.table.pages[num_shared]
            num_shared += self._keepers[page] == 1 and not self._refcounts[page] and page not in self._published
        fork = self._share(kept, request_id, num_tokens, room, num_shared)
        if fork is not None:
            self._hit_tokens += num_tokens
            if kept in self._kept:  # else its own pages were the last to be had
                self._kept[kept] = self._kept.pop(kept)  # used last
        return fork

    def extend(self, handle: KvCacheHandle, num_tokens: int) -> bool:
        """Give the handle room for ``num_tokens`` tokens in all; False, with nothing changed, if too few pages are free."""
        pages = handle.table.pages
        needed = self.pages_for(num_tokens) - len(pages)
        if needed > self.num_available:
            return False
        for _ in range(needed):
            pages.append(self._take())
        return True

    def publish(self, handle: KvCacheHandle, token_ids: Tokens[TokenId], num_computed: int) -> None:
        """The first ``num_computed`` tokens are written; let others hit the full pages among them."""
        handle.num_computed = num_computed
        if not self._prefix_caching:
            return
        size = self.block_size
        for index in range(len(handle.digests) - 1, num_computed // size):
            tokens = array("I", token_ids[index * size : (index + 1) * size]).tobytes()
            digest = self._chain(handle.digests[-1], tokens)
            handle.digests.append(digest)
            # Where two sequences computed the same page at the same time, the first one stays published.
            if digest not in self._by_digest:
                page = handle.table.pages[index]
                self._by_digest[digest] = page
                self._published[page] = _Published(digest, tokens)

    def deallocate(self, handle: KvCacheHandle) -> None:
        """Give up a handle's claim. Published pages stay cached, the end of the sequence to be evicted first."""
        self._check_held(handle, self._handles)
        self._handles.remove(handle)
        for page in reversed(handle.table.pages):
            self._release(page)
        handle.table.pages = []
        self._check_counts()

    def keep(self, handle: KvCacheHandle) -> None:
        """Its sequence has ended, and what is computed of it is kept until it is given up, or others need the pages."""
        self._check_held(handle, self._handles)
        self._handles.remove(handle)
        pages, num_kept = handle.table.pages, self.pages_for(handle.num_computed)
        for index in reversed(range(len(pages))):
            if index < num_kept:
                self._keepers[pages[index]] += 1
            self._release(pages[index])
        del pages[num_kept:]
        self._kept[handle] = None
        self._check_counts()

    def keep_too(self, kept: KvCacheHandle) -> KvCacheHandle:
        """A second claim on all pages of a kept handle, kept as well."""
        for page in kept.table.pages:
            self._keepers[page] += 1
        handle = msgspec.structs.replace(kept, table=BlockTable(list(kept.table.pages)), digests=list(kept.digests))
        self._kept[handle] = None
        return handle

    def count_hit(self, num_tokens: int) -> None:
        """So many tokens that a handle was to have computed came from elsewhere."""
        self._hit_tokens += num_tokens

    def give_up(self, kept: KvCacheHandle) -> None:
        """It is kept no longer."""
        self._check_held(kept, self._kept)
        del self._kept[kept]
        for page in reversed(kept.table.pages):
            self._keepers[page] -= 1
            if not self._keepers[page] and not self._refcounts[page]:
                self._num_kept -= 1
                self._let_go(page)
        kept.table.pages = []
        self._check_counts()

    def num_shared_tokens(self, handle: KvCacheHandle) -> int:
        """Tokens at its start in pages that other live sequences hold too."""
        pages, own = handle.table.pages, handle in self._handles
        first = next((index for index, page in enumerate(pages) if self._refcounts[page] <= own), len(pages))
        return first * self.block_size

    def num_kept_alone(self, kept: Iterable[KvCacheHandle]) -> int:
        """Pages of these handles that no live sequence holds."""
        return len({page for handle in kept for page in handle.table.pages if not self._refcounts[page]})

    def unpublish(self, handle: KvCacheHandle) -> None:
        """Nobody is to hit the pages that this handle alone holds."""
        for page in handle.table.pages:
            if self._refcounts[page] == 1 and page in self._published:
                del self._by_digest[self._published.pop(page).digest]

    def gc(self) -> int:
        """Evict every cached page; returns how many there were."""
        count = len(self._cached)
        while self._cached:
            self._free.append(self._evict())
        return count

    def statistics(self) -> CacheHandleStats:
        return CacheHandleStats(
            pages=PageCounts(
                total=self.num_pages,
                free=len(self._free),
                active=self._num_active,
                cached=len(self._cached) + self._num_kept,
            ),
            hit_tokens=self._hit_tokens,
        )

    def verify(self) -> None:
        """Check the whole ledger, in time linear in the pages; raises EngineFailed naming the first page that is wrong."""
        held, kept = [0] * self.num_pages, [0] * self.num_pages
        for counts, handles in ((held, self._handles), (kept, self._kept)):
            for handle in handles:
                for page in handle.table.pages:
                    counts[page] += 1
        free = set(self._free)
        if len(free) != len(self._free):
            raise EngineFailed("page ledger: a page is free twice")
        for page, count in enumerate(held):
            states = (count > 0 or kept[page] > 0) + (page in free) + (page in self._cached)
            if self._refcounts[page] != count or self._keepers[page] != kept[page] or states != 1:
                raise EngineFailed(
                    f"page ledger: page {page} is held by {count} tables, counted {self._refcounts[page]}, kept by "
                    f"{kept[page]}, counted {self._keepers[page]}, free: {page in free}, cached: {page in self._cached}"
                )
        num_kept = sum(keepers > 0 and not count for keepers, count in zip(kept, held, strict=True))
        if num_kept != self._num_kept:
            raise EngineFailed(f"page ledger: {num_kept} pages are kept alone, counted {self._num_kept}")
        for digest, page in self._by_digest.items():
            if page in free or self._published[page].digest != digest:
                raise EngineFailed(f"page ledger: page {page} is published wrongly")
        self._check_counts()

    def _match(self, request: AllocationRequest) -> tuple[list[int], list[bytes]]:
        """The longest published prefix: its pages, and the digests of its start and of each page."""
        digests = [hashlib.blake2b(request.salt, digest_size=16, key=self._key).digest()]
        pages: list[int] = []
        if not self._prefix_caching or not request.reuse_prefix:
            return pages, digests
        size = self.block_size
        for start in range(0, len(request.token_ids) - size, size):
            tokens = array("I", request.token_ids[start : start + size]).tobytes()
            digest = self._chain(digests[-1], tokens)
            page = self._by_digest.get(digest)
            if page is None or self._published[page].tokens != tokens:
                break
            pages.append(page)
            digests.append(digest)
        return pages, digests

    def _chain(self, digest: bytes, tokens: bytes) -> bytes:
        return hashlib.blake2b(digest + tokens, digest_size=16, key=self._key).digest()

    def _share(
        self, handle: KvCacheHandle, request_id: RequestId, num_tokens: int, room: int, num_shared: int
    ) -> KvCacheFork | None:
        """Of the pages with the first ``num_tokens`` tokens ``num_shared`` are shared; one more, if needed, is copied."""
        known = handle.table.pages
        pages = known[:num_shared]
        if not self._claim(pages, self.pages_for(room) - num_shared):
            return None
        fork = KvCacheHandle(
            request_id=request_id,
            table=BlockTable(pages),
            num_cached_tokens=num_tokens,
            digests=handle.digests[: num_tokens // self.block_size + 1],
        )
        self._handles.add(fork)
        is_copied = num_tokens > num_shared * self.block_size
        return KvCacheFork(fork, (known[num_shared], pages[num_shared]) if is_copied else None)

    def _claim(self, pages: list[int], needed: int) -> bool:
        """Hold these pages and ``needed`` new ones behind them; False, with nothing changed, if too few are free."""
        if needed > self.num_available - sum(self._refcounts[page] == 0 for page in pages):
            return False
        for page in pages:
            self._acquire(page)
        pages.extend(self._take() for _ in range(needed))
        return True

    def _take(self) -> int:
        while not self._free:
            if self._cached:
                self._free.append(self._evict())
            else:
                kept = next(iter(self._kept))
                self.on_reclaim(kept)
                self.give_up(kept)
        page = self._free.pop()
        self._acquire(page)
        return page

    def _evict(self) -> int:
        page = next(iter(self._cached))
        del self._cached[page]
        del self._by_digest[self._published.pop(page).digest]
        return page

    def _acquire(self, page: int) -> None:
        if self._refcounts[page] == 0:
            self._num_active += 1
            self._num_kept -= self._keepers[page] > 0
            self._cached.pop(page, None)
        self._refcounts[page] += 1

    def _release(self, page: int) -> None:
        self._refcounts[page] -= 1
        if self._refcounts[page] < 0:
            raise EngineFailed(f"page ledger: page {page} was given back more often than it was taken")
        if self._refcounts[page] == 0:
            self._num_active -= 1
            if self._keepers[page]:
                self._num_kept += 1
            else:
                self._let_go(page)

    def _let_go(self, page: int) -> None:
        """Nobody holds it any more."""
        if page in self._published:
            self._cached[page] = None
        else:
            self._free.append(page)

    def _check_held(self, handle: KvCacheHandle, handles: Container[KvCacheHandle]) -> None:
        if handle not in handles:
            raise EngineFailed(f"page ledger: {handle.request_id} gives back pages that it does not hold")

    def _check_counts(self) -> None:
        num_cached = len(self._cached) + self._num_kept
        if len(self._free) + self._num_active + num_cached != self.num_pages:
            raise EngineFailed(
                f"page ledger: {len(self._free)} free + {self._num_active} active + {num_cached} cached pages "
                f"are not the {self.num_pages} there are"
            )
