"""The page pool and the prefix cache."""

import pytest

from ferrum_rt import EngineFailed, RequestId
from ferrum_rt.interfaces.kv_cache import AllocationRequest, KvCacheHandle
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.runtime.scheduling.pages import PagedKvCache


def tokens(count: int, start: int = 0) -> list[TokenId]:
    return [TokenId(start + index) for index in range(count)]


def allocate(cache: PagedKvCache, name: str, ids: list[TokenId], salt: bytes = b"") -> KvCacheHandle | None:
    return cache.allocate(AllocationRequest(request_id=RequestId(name), token_ids=ids, num_tokens=len(ids), salt=salt))


def publish_and_free(cache: PagedKvCache, name: str, ids: list[TokenId], salt: bytes = b"") -> list[int]:
    handle = allocate(cache, name, ids, salt)
    assert handle is not None
    pages = list(handle.table.pages)
    cache.publish(handle, ids, len(ids))
    cache.deallocate(handle)
    return pages


def test_full_pages_of_a_prefix_are_shared() -> None:
    """A second sequence takes over the full pages it has in common with a published one, and one token is left to it."""
    cache = PagedKvCache(16, 4)
    first = publish_and_free(cache, "a", tokens(12))
    again = allocate(cache, "b", tokens(12))
    assert again is not None
    assert again.num_cached_tokens == 8
    assert again.table.pages[:2] == first[:2]
    other = allocate(cache, "c", tokens(8) + tokens(8, start=100))
    assert other is not None
    assert other.num_cached_tokens == 8
    cache.verify()


def test_nothing_is_shared_before_it_is_published() -> None:
    """Pages whose step has not been committed cannot be hit."""
    cache = PagedKvCache(16, 4)
    assert allocate(cache, "a", tokens(12)) is not None
    again = allocate(cache, "b", tokens(12))
    assert again is not None
    assert again.num_cached_tokens == 0


def test_another_salt_shares_nothing() -> None:
    """Clients do not see each other's prefixes."""
    cache = PagedKvCache(16, 4)
    publish_and_free(cache, "a", tokens(12), salt=b"alice")
    again = allocate(cache, "b", tokens(12), salt=b"bob")
    assert again is not None
    assert again.num_cached_tokens == 0


def test_the_least_recently_used_page_is_evicted_first() -> None:
    """Free pages go first, then cached ones by their last use; of one sequence, its end before its beginning."""
    cache = PagedKvCache(6, 4)
    old = publish_and_free(cache, "old", tokens(8))
    new = publish_and_free(cache, "new", tokens(8, start=50))
    assert allocate(cache, "fresh", tokens(8, start=100)) is not None  # the two free pages
    handle = allocate(cache, "one", tokens(4, start=200))
    assert handle is not None
    assert handle.table.pages == [old[1]]
    again = allocate(cache, "again", tokens(5))
    assert again is not None
    assert again.num_cached_tokens == 4, "the beginning of the older sequence is still there"
    assert again.table.pages == [old[0], new[1]]


def test_too_few_pages_change_nothing() -> None:
    """allocate and extend say no without side effects."""
    cache = PagedKvCache(4, 4)
    publish_and_free(cache, "a", tokens(8))
    before = cache.statistics()
    assert allocate(cache, "b", tokens(20)) is None
    assert cache.statistics() == before
    handle = allocate(cache, "c", tokens(10, start=30))
    assert handle is not None
    pages = list(handle.table.pages)
    assert not cache.extend(handle, 17)
    assert handle.table.pages == pages
    assert cache.extend(handle, 16)
    cache.verify()


def test_gc_empties_the_prefix_cache() -> None:
    """gc turns every cached page into a free one and says how many."""
    cache = PagedKvCache(8, 4)
    publish_and_free(cache, "a", tokens(12))
    assert cache.gc() == 3
    assert cache.statistics().pages.free == 8
    cache.verify()


def test_giving_back_twice_is_an_error() -> None:
    """A handle that was given back cannot be given back again."""
    cache = PagedKvCache(8, 4)
    handle = allocate(cache, "a", tokens(4))
    assert handle is not None
    cache.deallocate(handle)
    with pytest.raises(EngineFailed, match="does not hold"):
        cache.deallocate(handle)


def test_prefix_caching_can_be_switched_off() -> None:
    """Without it every page is free again after its sequence."""
    cache = PagedKvCache(8, 4, prefix_caching=False)
    publish_and_free(cache, "a", tokens(12))
    assert cache.statistics().pages.free == 8
