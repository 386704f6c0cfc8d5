"""Sessions: what a turn has computed the next one need not, and what a session is given up for."""

from typing import Any

import pytest

from ferrum_rt.interfaces.errors import ConfigError, NotFound, RequestValidationError
from ferrum_rt.interfaces.types import ClientId, RequestId, SessionId, TokenId
from ferrum_rt.runtime.simulation.digests import expected_tokens
from tests.runtime.engines import fake_engine, text_after
from tests.runtime.scheduling.chats import Chat
from tests.runtime.scheduling.schedules import Schedule

CHAT, OTHER = SessionId("chat"), SessionId("other")
DEFAULT = ClientId("default")


def test_a_turn_computes_only_what_is_new() -> None:
    """Of a prompt that begins with the session's text only the rest is computed, in the session's own last page: the last
    token of the output, which nothing has been computed for yet, and the new ones."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5])
    text = chat.turn([*text, 7, 8])
    assert (chat.num_prefilled, chat.num_copies) == (3, 0)
    chat.turn([*text, 9])
    assert (chat.num_prefilled, chat.num_copies) == (2, 0)


def test_a_turn_that_parts_keeps_what_is_common() -> None:
    """The common prefix is taken over, its last page as a copy, for the session still needs its own if the turn fails."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5])
    parted = [*text[:7], 99, 98]
    chat.turn(parted)
    assert (chat.num_prefilled, chat.num_copies) == (2, 1)


def test_a_prompt_that_is_the_sessions_text_leaves_a_token_to_compute() -> None:
    """At least the last token of a prompt is computed, be the session as long as it or longer."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5])
    for prompt in (text[:-1], text[:6], text[:1]):
        chat.turn(prompt, session="chat")
        assert chat.num_prefilled == 1
        chat.sessions.end(DEFAULT, CHAT)
        chat.turn([1, 2, 3, 4, 5])


def test_sessions_are_their_clients() -> None:
    """Another client's session of the same name is another session."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5], client="one")
    chat.turn([*text, 7], client="two")
    assert chat.num_prefilled == len(text) + 1
    assert not chat.sessions.end(DEFAULT, CHAT)
    assert chat.sessions.end(ClientId("one"), CHAT)


def test_kept_pages_are_cached_not_active() -> None:
    """Between turns no page is active; the session's are cached, and free when it has ended."""
    chat = Chat()
    chat.turn([1, 2, 3, 4, 5])
    assert (chat.pages.active, chat.pages.cached) == (0, 3)
    assert chat.sessions.end(DEFAULT, CHAT)
    assert not chat.sessions.end(DEFAULT, CHAT)
    assert chat.pages.free == chat.pages.total


def test_two_at_once_do_not_write_to_one_page() -> None:
    """Of two requests that go on from a session at the same time one writes to its last page, the other to a copy; the
    one that ends last is what the session goes on from."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5])
    chat.num_copies = 0
    chat.begin([*text, 7])
    chat.begin([*text, 8], max_tokens=12)
    chat.schedule.run()
    chat.schedule.check_tokens()
    assert chat.num_copies == 1
    chat.turn([*text, 8, *chat.schedule.tokens[RequestId("r3")], 9])
    assert chat.num_prefilled == 2


def test_a_fork_shares_all_pages() -> None:
    """A fork takes no page; the first to go on copies the last page, the second has it for itself."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5])
    before = chat.pages
    chat.sessions.fork(DEFAULT, CHAT, OTHER)
    assert chat.pages == before
    chat.turn([*text, 7])
    assert (chat.num_prefilled, chat.num_copies) == (2, 1)
    chat.turn([*text, 8], session="other")
    assert (chat.num_prefilled, chat.num_copies) == (2, 0)


def test_what_cannot_be_forked() -> None:
    """A session that is not there is NotFound, a name that is taken a RequestValidationError."""
    chat = Chat()
    with pytest.raises(NotFound, match="no session 'chat'"):
        chat.sessions.fork(DEFAULT, CHAT, OTHER)
    chat.turn([1])
    with pytest.raises(RequestValidationError, match=r"new_session_id.*'chat'"):
        chat.sessions.fork(DEFAULT, CHAT, CHAT)


def test_a_session_expires() -> None:
    """It is given up when nobody has used it for ``session_ttl_s``, which next_deadline says; a turn is a use."""
    chat = Chat(session_ttl_s=10.0)
    text = chat.turn([1, 2, 3, 4, 5])
    chat.schedule.now = 8.0
    chat.turn([*text, 7])
    due = chat.schedule.scheduler.next_deadline()
    assert due is not None
    assert 18.0 < due < 18.2
    chat.schedule.scheduler.expire(due - 0.01)
    assert len(chat.sessions) == 1
    chat.schedule.scheduler.expire(due)
    assert len(chat.sessions) == 0
    assert chat.pages.free == chat.pages.total


@pytest.mark.parametrize(
    "limit", [{"max_sessions": 2}, {"num_pages": 8}, {"clients": {"default": {"max_page_share": 7 / 256}}}]
)
def test_the_least_recently_used_goes_first(limit: dict[str, Any]) -> None:
    """Beyond their number, the pool's pages or the client's share of them, the session that was not used for longest is
    given up; no request is preempted for it."""
    chat = Chat(**limit)
    first = chat.turn([1, 2, 3, 4, 5], session="first")
    chat.turn([2, 2, 3, 4, 5], session="second")
    chat.turn([*first, 9], max_tokens=1, session="first")
    third = chat.turn([3, 2, 3, 4, 5], session="third")
    assert not chat.sessions.end(DEFAULT, SessionId("second"))
    chat.turn([*third, 7], max_tokens=1, session="third")
    assert chat.num_prefilled == 2
    assert chat.schedule.scheduler.statistics().preemptions == 0


def test_requests_go_before_sessions() -> None:
    """A request that needs all pages there are gets those of sessions at once."""
    chat = Chat(num_pages=4)
    chat.turn([1, 2, 3, 4, 5])
    chat.turn(list(range(10)), session=None)  # type: ignore[arg-type]
    assert len(chat.sessions) == 0


def test_what_does_not_end_well_leaves_the_session_as_it_was() -> None:
    """A request that is cancelled half-way, or fails, changes nothing of its session; the next goes on from the turn
    before."""
    chat = Chat()
    text = chat.turn([1, 2, 3, 4, 5])
    for is_cancelled in (True, False):
        chat.spoil([*text, 7, 8, 9, 10, 11], max_tokens=50, after_steps=12, is_cancelled=is_cancelled)
        assert len(chat.sessions) == 1
        assert chat.pages.active == 0
    text = chat.turn([*text, 7, 12])
    assert (chat.num_prefilled, chat.num_copies) == (3, 0)


def test_a_page_that_others_can_hit_is_not_written_to() -> None:
    """A cancelled turn has filled the session's last page and published it: the next turn gets a copy, and who hits the page
    has the tokens it was published for."""
    chat = Chat(prefix_caching=True)
    text = chat.turn([1, 2, 3, 4, 5])
    cancelled = [*text, *range(30, 40)]
    name = chat.begin(cancelled, max_tokens=50)
    for _ in range(5):
        chat.schedule.step()
    chat.schedule.scheduler.cancel(name)
    chat.schedule.run()
    chat.turn([*text, 7, 8, 9, 10])
    assert chat.num_copies == 1
    chat.turn([*cancelled, 1], session=None)  # type: ignore[arg-type]
    assert chat.num_prefilled <= 4


def test_a_stop_strings_end_is_an_end_like_any_other() -> None:
    """What was computed before a stop string was found stays with the session."""
    chat = Chat()
    name = chat.begin([1, 2, 3, 4, 5], max_tokens=50)
    for _ in range(6):
        chat.schedule.step()
    known = [TokenId(token) for token in (1, 2, 3, 4, 5)] + chat.schedule.tokens[name]
    assert chat.schedule.scheduler.end_well(name, 0)
    assert not chat.schedule.scheduler.end_well(name, 0)
    chat.schedule.run()
    chat.schedule.requests.pop(name)
    chat.turn([*known, 9])
    assert chat.num_prefilled == 2


def test_of_several_samples_the_first_is_the_sessions() -> None:
    """When all have ended well; until then the session is as it was."""
    chat = Chat()
    chat.begin([1, 2, 3, 4, 5], num_samples=3)
    chat.schedule.run()
    text = [1, 2, 3, 4, 5, *expected_tokens([1, 2, 3, 4, 5], 6)]
    chat.turn([*text, 7])
    assert chat.num_prefilled == 2
    name = chat.begin([*text, 8], max_tokens=8, num_samples=2)
    while 0 in [one.index for one in chat.schedule.scheduler._roster.sequences[name]]:
        chat.schedule.step()
    chat.schedule.scheduler.cancel(name)
    chat.schedule.run()
    chat.turn([*text, 7, 7])
    assert chat.num_prefilled <= 9, "the session is still that of the second turn"
    chat.schedule.cache.verify()


@pytest.mark.parametrize("wrong", [{"session_ttl_s": 0}, {"session_ttl_s": -1.0}, {"max_sessions": 0}])
def test_wrong_limits_are_named(wrong: dict[str, Any]) -> None:
    """A ConfigError names the field."""
    with pytest.raises(ConfigError, match=f"scheduler.{next(iter(wrong))}"):
        Schedule(**wrong)


async def test_the_runtimes_sessions() -> None:
    """A session of the engine keeps pages, is forked and ended, and its turns have the text that they have without."""
    async with fake_engine({"kv_cache": {"prefix_caching": False}}) as (engine, _):
        first = await engine.infer("hello", session_id=CHAT, max_tokens=9)
        await engine.fork_session(CHAT, OTHER)
        prompt = "hello" + first.text
        for name in (CHAT, OTHER):
            again = await engine.infer(f"{prompt}!", session_id=name, max_tokens=5)
            assert again.text == text_after(f"{prompt}!", 5)
            assert again.usage.cached_tokens == len(prompt) - 1
        pages = (await engine.status()).pages
        assert pages.active == 0
        assert pages.cached > 0
        assert await engine.end_session(CHAT)
        assert not await engine.end_session(CHAT)
        with pytest.raises(NotFound):
            await engine.fork_session(CHAT, OTHER)


async def test_a_stop_string_ends_a_turn_well() -> None:
    """The runtime keeps the session of a request that a stop string ended."""
    async with fake_engine({"kv_cache": {"prefix_caching": False}}) as (engine, _):
        whole = text_after("hello", 40)
        cut = await engine.infer("hello", session_id=CHAT, max_tokens=40, stop=[whole[10:13]])
        assert cut.text == whole[:10]
        again = await engine.infer(f"hello{cut.text}?", session_id=CHAT, max_tokens=3)
        assert again.text == text_after(f"hello{cut.text}?", 3)
        assert again.usage.cached_tokens == len("hello") + 10
