"""Pages of keys and values: who holds which, and what is shared."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.types import PageCounts, RequestId, TokenId


class BlockTable(msgspec.Struct):
    """The pages of one sequence, in token order: token t lies in ``pages[t // block_size]``."""

    pages: list[int] = []


class AllocationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Pages wanted for a sequence that starts (or starts again).

    ``token_ids`` are all its known tokens, ``num_tokens`` how many need room now. Prefixes are shared only between
    requests with the same ``salt``; without ``reuse_prefix`` everything is to be computed again.
    """

    request_id: RequestId
    token_ids: Sequence[TokenId]
    num_tokens: int
    salt: bytes = b""
    reuse_prefix: bool = True


class KvCacheHandle(msgspec.Struct, eq=False, kw_only=True):
    """A sequence's claim on pages: a live one's, or what is kept of one that has ended. The first ``num_cached_tokens`` were
    computed by somebody else before; ``num_computed`` are known to be written, once a step of its own has been committed.
    ``digests`` are those of its start and of each page after it that is published."""

    request_id: RequestId
    table: BlockTable
    num_cached_tokens: int
    digests: list[bytes]
    num_computed: int = 0


class KvCacheFork(msgspec.Struct, frozen=True):
    """A further claim on the pages of a sequence's start. Its last page, if it is not full, cannot be shared: then ``copy``
    is that page and the fork's own, which must be given the same content before it is read."""

    handle: KvCacheHandle
    copy: tuple[int, int] | None


class CacheHandleStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the cache since its start, and the pages now."""

    pages: PageCounts
    hit_tokens: int


class KvCacheManager(Protocol):
    """Owns every page. Synchronous; ``None`` and False mean that too few pages are free."""

    block_size: int

    def allocate(self, request: AllocationRequest) -> KvCacheHandle | None: ...
    def fork(self, handle: KvCacheHandle, num_tokens: int, room: int) -> KvCacheFork | None: ...
    def extend(self, handle: KvCacheHandle, num_tokens: int) -> bool: ...
    def publish(self, handle: KvCacheHandle, token_ids: Sequence[TokenId], num_computed: int) -> None: ...
    def deallocate(self, handle: KvCacheHandle) -> None: ...
    def keep(self, handle: KvCacheHandle) -> None: ...
    def resume(self, kept: KvCacheHandle, request_id: RequestId, num_tokens: int, room: int) -> KvCacheFork | None: ...
    def give_up(self, kept: KvCacheHandle) -> None: ...
    def statistics(self) -> CacheHandleStats: ...
    def gc(self) -> int: ...
