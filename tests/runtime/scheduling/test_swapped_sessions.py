"""Sessions on the host: when they go there, what comes back, and who takes their place."""

from typing import Any

import pytest

from ferrum_rt.interfaces.errors import EngineFailed
from ferrum_rt.interfaces.kv_cache import AllocationRequest, KvCacheHandle
from ferrum_rt.interfaces.model_executor import StepInput, UnifiedBatch
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import ClientId, RequestId, SessionId, TokenId
from ferrum_rt.runtime.scheduling.cost_model import CostModel
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.sequence import Sequence
from ferrum_rt.runtime.scheduling.sessions import Sessions
from ferrum_rt.runtime.scheduling.swapping import Swapping
from tests.runtime.scheduling.chats import Chat

FAST = 1e15  # bytes a second, so the way back takes no time
CHAT, OTHER = SessionId("chat"), SessionId("other")
DEFAULT = ClientId("default")


def host_chat(num_host_pages: int = 64, *, bytes_per_s: float = FAST, **fields: Any) -> Chat:
    """Ten pages, and others on the host. The cost model has seen enough steps."""
    chat = Chat(num_pages=10, num_host_pages=num_host_pages, **fields)
    chat.schedule.submit("warm", max_tokens=20)
    chat.schedule.run()
    chat.schedule.scheduler.swapping.bytes_per_s = bytes_per_s
    return chat


def swapping_of(chat: Chat) -> Swapping:
    chat.schedule.scheduler.swapping.verify()
    chat.sessions.verify()
    return chat.schedule.scheduler.swapping


def take_all_pages(chat: Chat) -> None:
    chat.turn([200 + index for index in range(38)], max_tokens=2, session=None)  # type: ignore[arg-type]


def num_host_pages(chat: Chat) -> int:
    """Those that are held."""
    return sum(claims > 0 for claims in swapping_of(chat)._claims)


def test_a_session_that_makes_way_comes_back() -> None:
    """When a request wants all pages the session goes to the host, and no request is preempted; its next turn computes only
    what is new, all that it has on the host being as it was."""
    chat = host_chat()
    text = chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    assert (len(chat.sessions), num_host_pages(chat), chat.pages.cached) == (1, 3, 0)
    hits = chat.schedule.scheduler.statistics().cached_tokens
    text = chat.turn([*text, 7, 8])
    assert chat.num_prefilled == 3
    assert swapping_of(chat).num_in == 3
    assert chat.schedule.scheduler.statistics().cached_tokens == hits + 10
    assert num_host_pages(chat) == 0, "the session that is on the device now has taken its place"
    chat.turn([*text, 9])
    assert chat.num_prefilled == 2
    assert chat.schedule.scheduler.statistics().preemptions == 0


@pytest.mark.parametrize(("num_host_pages", "bytes_per_s"), [(64, 1e-3), (2, FAST), (0, FAST)])
def test_it_is_given_up_where_that_is_cheaper(num_host_pages: int, bytes_per_s: float) -> None:
    """A host that is slow, or has too few pages, gets none; the next turn computes all of its prompt."""
    chat = host_chat(num_host_pages, bytes_per_s=bytes_per_s)
    text = chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    assert len(chat.sessions) == 0
    assert swapping_of(chat).num_out == 0
    chat.turn([*text, 7, 8])
    assert chat.num_prefilled == len(text) + 2


def test_a_turn_that_parts_gets_what_is_common() -> None:
    """Only the pages with common tokens come back, and only those that the prefix cache does not have."""
    chat = host_chat()
    text = chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    chat.turn([*text[:6], 99, 98])
    assert (chat.num_prefilled, swapping_of(chat).num_in) == (2, 2)

    chat = host_chat(prefix_caching=True)
    text = chat.turn([1, 2, 3, 4, 5])
    chat.turn([200 + index for index in range(34)], max_tokens=2, session=None)  # type: ignore[arg-type]
    assert num_host_pages(chat) == 3
    chat.turn([*text, 7])
    assert chat.num_prefilled == 2
    assert 0 < swapping_of(chat).num_in < 3, "the first page was published, and not needed by others"


def test_pages_that_a_request_shares_go_to_the_host_too() -> None:
    """A session of which a live request holds the first two pages has all of them on the host, and back when that request
    has ended."""
    chat = host_chat()
    text = chat.turn([1, 2, 3, 4, 5])
    (session,) = chat.sessions._sessions.values()
    assert isinstance(session.held, KvCacheHandle)
    name = chat.begin([*text[:8], 99], max_tokens=30)
    while num_host_pages(chat) == 0:
        assert chat.schedule.step()
        if isinstance(session.held, KvCacheHandle):
            assert chat.schedule.cache.num_shared_tokens(session.held) == 8
    assert num_host_pages(chat) == 3
    chat.schedule.scheduler.cancel(name)
    chat.schedule.run()
    take_all_pages(chat)
    chat.turn([*text, 7])
    assert chat.num_prefilled == 2


def test_a_turn_that_does_not_end_well_leaves_it_on_the_host() -> None:
    """A request that is cancelled, or fails, changes nothing of its session; two at once go on from it both."""
    chat = host_chat()
    text = chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    for is_cancelled in (True, False):
        chat.spoil([*text, 7], max_tokens=20, after_steps=4, is_cancelled=is_cancelled)
        assert (num_host_pages(chat), chat.pages.active) == (3, 0)
    chat.num_prefilled = 0
    chat.begin([*text, 7])
    chat.begin([*text, 8])
    chat.schedule.run()
    chat.schedule.check_tokens()
    assert chat.num_prefilled == 4


@pytest.mark.parametrize("how", ["end", "expire", "max_sessions"])
def test_it_gives_its_host_pages_back_at_once(how: str) -> None:
    """When it is ended, expires, or is beyond the sessions that may be."""
    chat = host_chat(session_ttl_s=1000.0, max_sessions=1)
    chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    assert num_host_pages(chat) == 3
    if how == "end":
        assert chat.sessions.end(DEFAULT, CHAT)
    elif how == "expire":
        due = chat.schedule.scheduler.next_deadline()
        assert due is not None
        chat.schedule.scheduler.expire(due)
    else:
        chat.turn([9], session="other")
    assert num_host_pages(chat) == 0
    assert not chat.sessions.end(DEFAULT, CHAT)


def test_a_fork_shares_the_host_pages() -> None:
    """A fork of a session on the host takes no page; each goes on from there, whatever becomes of the other."""
    chat = host_chat()
    text = chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    chat.sessions.fork(DEFAULT, CHAT, OTHER)
    assert num_host_pages(chat) == 3
    chat.turn([*text, 7])
    assert (chat.num_prefilled, num_host_pages(chat)) == (2, 3)
    chat.turn([*text, 8], session="other")
    assert (chat.num_prefilled, num_host_pages(chat)) == (2, 0)


@pytest.mark.parametrize("used", [None, "first"])
def test_the_least_recently_used_makes_room_on_the_host(used: str | None) -> None:
    """Where the host is full, another session goes there in place of the one that was used longest ago; a turn is a use,
    even if it is cancelled."""
    chat = host_chat(num_host_pages=7)
    texts: dict[str, list[int]] = {}
    for name in ("first", "second", "third"):
        if name == "third" and used is not None:
            cancelled = chat.begin([*texts[used], 7], session=used)
            chat.schedule.step()
            chat.schedule.scheduler.cancel(cancelled)
            chat.schedule.run()
        texts[name] = chat.turn([*name.encode()[:5], 1], session=name)
        take_all_pages(chat)
    assert num_host_pages(chat) == 6
    gone, stays = ("first", "second") if used is None else ("second", "first")
    assert not chat.sessions.end(DEFAULT, SessionId(gone))
    for name in ("third", stays):
        chat.turn([*texts[name], 7], session=name)
        assert chat.num_prefilled == 2


@pytest.mark.parametrize(("num_pages", "is_swapped"), [(6, True), (4, False)])
def test_who_is_preempted_comes_before_sessions(num_pages: int, is_swapped: bool) -> None:
    """A sequence that wants room on the host gets that of a session, which is over then; but if even that is too little,
    it is computed again, and the session stays."""
    chat = host_chat(num_pages)
    chat.turn([1, 2, 3, 4, 5])
    take_all_pages(chat)
    for first in (1, 2):
        chat.schedule.submit(f"p{first}", prompt=[first, 1, 2, 3], max_tokens=30)
    while not chat.schedule.scheduler.statistics().preemptions:
        chat.schedule.step()
    assert len(swapping_of(chat)._swapped) == is_swapped
    assert chat.sessions.end(DEFAULT, CHAT) is not is_swapped
    chat.schedule.run()
    chat.schedule.check_tokens()
    assert num_host_pages(chat) == 0


def kept(cache: PagedKvCache, name: str) -> KvCacheHandle:
    """A handle with two pages, all computed."""
    handle = cache.allocate(AllocationRequest(request_id=RequestId(name), token_ids=[TokenId(1)] * 8, num_tokens=8))
    assert handle is not None
    handle.num_computed = 8
    cache.keep(handle)
    return handle


def test_a_host_page_that_is_read_is_free_only_in_the_next_step() -> None:
    """What a step brings back is not written to in that step, though the session that had it has ended meanwhile."""
    cache, costs = PagedKvCache(8, 4, prefix_caching=False), CostModel()
    costs.coefficients = [1.0, 0.0, 0.0, 0.0]
    swapping = Swapping(cache, costs, num_pages=2, page_bytes=1)
    one, other = kept(cache, "one"), kept(cache, "other")
    on_host = swapping.keep(one)
    assert on_host is not None
    arriving = cache.allocate(AllocationRequest(request_id=RequestId("r"), token_ids=[TokenId(1)] * 9, num_tokens=9))
    assert arriving is not None
    request = SequenceRequest(request_id=RequestId("r"), token_ids=[TokenId(1)] * 9, max_tokens=1, sampling=SamplingConfig())
    sequence = Sequence(request, 0)

    swapping.read(sequence, arriving, on_host, 8)
    swapping.give_up(on_host)

    assert sequence in swapping.arriving
    assert swapping.keep(other) is None
    swapping.verify()
    step = StepInput([], [], [], UnifiedBatch([], []))
    swapping.carry_out(step)
    assert [pair.host_page for pair in step.swapped_in] == [pair.host_page for pair in step.swapped_out]
    assert swapping.keep(other) is not None
    swapping.verify()


def test_a_session_without_a_page_is_found() -> None:
    """verify says which it is."""
    chat = host_chat()
    chat.turn([1, 2, 3, 4, 5])
    sessions: Sessions = chat.sessions
    sessions.verify()
    next(iter(sessions._sessions.values())).tokens.extend([TokenId(1)] * 4)
    with pytest.raises(EngineFailed, match=r"session ledger.*'chat'.*3 pages for 14 tokens"):
        sessions.verify()
