"""Sessions over a connection: a user ends and forks his own, and nobody else's, whatever he says."""

import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from ferrum_rt.interfaces.types import ClientId, SessionId
from ferrum_rt.ipc.messages import (
    ClientMessage,
    EndSession,
    Finished,
    ForkSession,
    Query,
    Refused,
    Report,
    Submit,
    WireRequest,
    WireSampling,
)
from tests.daemon.serving import daemon, server
from tests.daemon.test_quotas import NOBODY, US, as_root, connected_as, open_directory
from tests.daemon.test_session import HELLO, Peer, connected
from tests.runtime.engines import text_after

__all__ = ["open_directory"]  # a fixture

CHAT = SessionId("chat")
UNCACHED = {"kv_cache": {"prefix_caching": False}}
LONG = "a" * 256


def turn(request_id: str, text: str, client_id: str = "default", session_id: str = CHAT) -> Submit:
    sampling = WireSampling(max_tokens=9)
    request = WireRequest(text=text, client_id=client_id, session_id=session_id, sampling=sampling)
    return Submit(request_id=request_id, request=request, credit=100)


def claims(client_id: str) -> list[ClientMessage]:
    """What somebody says who takes a session for his client's."""
    return [
        EndSession(query_id=1, session_id=CHAT, client_id=client_id),
        ForkSession(query_id=2, session_id=CHAT, new_session_id="mine", client_id=client_id),
    ]


def answers(peer: Peer) -> list[tuple[int, str]]:
    """To each query in turn: its report, or the code of its refusal."""
    return [
        (message.query_id, message.content if isinstance(message, Report) else message.code)
        for message in peer.heard
        if isinstance(message, Report | Refused)
    ]


async def cached_tokens(peer: Peer, request_id: str, text: str) -> int:
    """How much of the next turn was there already."""
    await peer.say(turn(request_id, text))
    await peer.hear_end_of(request_id)
    assert peer.text(request_id) == text_after(text, 9)
    usage = peer.chunks(request_id)[-1].usage
    assert usage is not None
    return usage.cached_tokens


async def test_a_session_is_forked_and_ended(tmp_path: Path) -> None:
    """Each is answered under its number; what cannot be done is refused, and the connection goes on."""
    async with daemon(tmp_path, config=UNCACHED) as (_, path), connected(path) as peer:
        await peer.say(HELLO, turn("a", "hello"))
        await peer.hear_end_of("a")
        await peer.say(
            ForkSession(query_id=1, session_id=CHAT, new_session_id="other"),
            ForkSession(query_id=2, session_id=CHAT, new_session_id="other"),
            EndSession(query_id=3, session_id=CHAT),
            EndSession(query_id=4, session_id=CHAT),
            ForkSession(query_id=5, session_id=CHAT, new_session_id="third"),
            EndSession(query_id=6, session_id="a\n\x1b[2J"),
            ForkSession(query_id=7, session_id="other", new_session_id=""),
            EndSession(query_id=8, session_id="other", client_id="\x00"),
            EndSession(query_id=9, session_id=LONG, client_id=LONG),
            EndSession(query_id=-1, session_id="other"),
        )
        await until_answered(peer, 10)
    wrong = "request_validation_error"
    assert answers(peer) == [
        (1, "null"),
        (2, wrong),
        (3, "true"),
        (4, "false"),
        (5, "not_found"),
        (6, wrong),
        (7, wrong),
        (8, wrong),
        (9, "false"),
        (-1, "true"),
    ]


async def until_answered(peer: Peer, count: int) -> None:
    while len(answers(peer)) < count:
        await peer.hear(until_count=len(peer.heard) + 1)


@pytest.mark.parametrize(
    "wrong",
    [EndSession(query_id=1, session_id=LONG + "a"), ForkSession(query_id=1, session_id="a", new_session_id=LONG + "a")],
)
async def test_a_name_beyond_its_bound_ends_the_connection(tmp_path: Path, wrong: ClientMessage) -> None:
    """As it does in any message."""
    async with daemon(tmp_path) as (_, path), connected(path) as peer:
        await peer.say(HELLO, wrong)
        await peer.hear_all()
    assert answers(peer) == []
    assert getattr(peer.heard[-1], "code", None) == "invalid_format"


@pytest.mark.parametrize(
    "claimed",
    [
        "default",
        f"uid {NOBODY}/default",
        f"../uid {NOBODY}/default",
        f"default/../../uid {NOBODY}/default",
        f"{NOBODY}/default",
    ],
)
async def test_no_name_leads_to_another_users_session(tmp_path: Path, claimed: str) -> None:
    """A client may call itself what it likes: the sessions of another user, and of the daemon's own process, are not there
    for it, and are as they were."""
    victim = ClientId(f"uid {NOBODY}/default")
    async with daemon(tmp_path, config=UNCACHED) as (engine, path), connected(path) as peer:
        for client_id in (victim, ClientId("default")):
            await engine.infer("hello", max_tokens=3, session_id=CHAT, client_id=client_id)
        await peer.say(HELLO, *claims(claimed))
        await until_answered(peer, 2)
        assert answers(peer) == [(1, "false"), (2, "not_found")]
        for client_id in (victim, ClientId("default")):
            assert not await engine.end_session(SessionId("mine"), client_id)
            assert await engine.end_session(CHAT, client_id)


@as_root
async def test_two_users_sessions_are_apart(open_directory: Path) -> None:
    """Of two users with the same names for everything, each ends and forks his own alone; the other's next turn has all
    that it had."""
    async with AsyncExitStack() as stack:
        _, path, _ = await stack.enter_async_context(server(open_directory, uids=(US, NOBODY), config=UNCACHED))
        path.chmod(0o666)
        thief, owner = (
            await stack.enter_async_context(connected_as(path, NOBODY)),
            await stack.enter_async_context(connected(path)),
        )
        await owner.say(HELLO, turn("a", "hello"))
        await owner.hear_end_of("a")
        await thief.say(HELLO, *claims("default"), *claims(f"uid {US}/default"))
        await until_answered(thief, 4)
        assert answers(thief) == [(1, "false"), (2, "not_found")] * 2
        prompt = "hello" + owner.text("a")
        await thief.say(turn("a", f"{prompt}!"))
        await thief.hear_end_of("a")
        ends = [message for message in thief.heard if isinstance(message, Finished)]
        assert len(ends) == 1
        usage = thief.chunks("a")[-1].usage
        assert usage is not None
        assert usage.cached_tokens == 0
        await thief.say(EndSession(query_id=3, session_id=CHAT))
        await until_answered(thief, 5)
        assert answers(thief)[-1] == (3, "true")
        assert await cached_tokens(owner, "b", f"{prompt}!") == len(prompt) - 1


async def test_who_forks_without_end_pushes_out_his_own(tmp_path: Path) -> None:
    """Forks take no page and cost nothing, so a user can make as many as he likes; another's session stays."""
    config = {**UNCACHED, "scheduler": {"max_sessions": 8}}
    victim = ClientId(f"uid {NOBODY}/default")
    async with daemon(tmp_path, config=config) as (engine, path), connected(path) as peer:
        await engine.infer("hello", max_tokens=3, session_id=CHAT, client_id=victim)
        await peer.say(HELLO, turn("a", "hello"))
        await peer.hear_end_of("a")
        for number in range(30):
            name = f"{number - 1}" if number else CHAT
            await peer.say(ForkSession(query_id=number, session_id=name, new_session_id=f"{number}"))
        await until_answered(peer, 30)
        assert answers(peer) == [(number, "null") for number in range(30)]
        assert await engine.end_session(CHAT, victim)
        for number, is_there in ((0, False), (29, True)):
            assert await engine.end_session(SessionId(f"{number}"), ClientId(f"uid {os.getuid()}/default")) is is_there


async def test_a_daemon_that_drains_changes_no_session(tmp_path: Path) -> None:
    """Then the refusal is as for a request: cancelled."""
    async with daemon(tmp_path, step_s=0.001) as (engine, path), connected(path) as peer:
        await peer.say(HELLO, Query(query_id=0, kind="health"))
        await until_answered(peer, 1)
        await engine.shutdown()
        await peer.say(*claims("default"))
        await until_answered(peer, 3)
    assert answers(peer)[1:] == [(1, "cancelled"), (2, "cancelled")]
