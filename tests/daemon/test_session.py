"""One connection to the daemon, over a real socket, spoken to in frames."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.interfaces.types import StreamChunk
from ferrum_rt.ipc.framing import encode, server_decoder
from ferrum_rt.ipc.messages import (
    Accepted,
    Cancel,
    Chunks,
    ClientMessage,
    Credit,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Query,
    Report,
    ServerMessage,
    Submit,
    Welcome,
    WireRequest,
    WireSampling,
)
from tests.daemon.serving import daemon
from tests.runtime.engines import text_after, until

HELLO = Hello(version=1, client="test")


class Peer:
    """A client that says what it is told and notes what it hears, until ``stop`` or the end."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self._stream, self._decoder = stream, server_decoder()
        self.heard: list[ServerMessage] = []

    async def say(self, *messages: ClientMessage) -> None:
        await self._stream.send(b"".join(map(encode, messages)))

    async def hear(self, *, until_count: int) -> list[ServerMessage]:
        """Listen until so many messages were heard in all."""
        with anyio.fail_after(10):
            while len(self.heard) < until_count:
                self.heard.extend(self._decoder.feed(await self._stream.receive()))
        return self.heard

    async def hear_all(self) -> list[ServerMessage]:
        """Listen until the daemon closes."""
        with anyio.fail_after(10):
            try:
                while True:
                    self.heard.extend(self._decoder.feed(await self._stream.receive()))
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return self.heard

    async def hear_end_of(self, *request_ids: str) -> list[ServerMessage]:
        """Listen until these have ended."""
        waiting = set(request_ids)
        with anyio.fail_after(10):
            while waiting := waiting - {m.request_id for m in self.heard if isinstance(m, Finished | Failed)}:
                self.heard.extend(self._decoder.feed(await self._stream.receive()))
        return self.heard

    def chunks(self, request_id: str) -> list[StreamChunk]:
        return [c for m in self.heard if isinstance(m, Chunks) for c in m.chunks if c.request_id == request_id]

    def text(self, request_id: str) -> str:
        return "".join(chunk.text for chunk in self.chunks(request_id))

    async def hang_up(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Peer]:
    async with await anyio.connect_unix(path) as stream:
        yield Peer(stream)


def ask(request_id: str, text: str, *, max_tokens: int = 10, credit: int = 1000) -> Submit:
    return Submit(
        request_id=request_id, request=WireRequest(text=text, sampling=WireSampling(max_tokens=max_tokens)), credit=credit
    )


async def test_requests_are_answered(tmp_path: Path) -> None:
    """Hello is welcomed, each request accepted, its chunks add up to the answer, and its last message is finished."""
    async with daemon(tmp_path) as (_, path), connected(path) as peer:
        await peer.say(HELLO, ask("a", "one"), ask("b", "two"))
        await peer.hear_end_of("a", "b")
    assert isinstance(peer.heard[0], Welcome)
    assert (peer.heard[0].version, peer.heard[0].model) == (1, "fake")
    assert [m.request_id for m in peer.heard if isinstance(m, Accepted)] == ["a", "b"]
    assert (peer.text("a"), peer.text("b")) == (text_after("one", 10), text_after("two", 10))
    assert peer.chunks("a")[-1].usage is not None
    assert sum(isinstance(m, Finished) for m in peer.heard) == 2
    assert not any(isinstance(m, Failed) for m in peer.heard)


async def test_the_chunks_of_one_step_share_a_frame(tmp_path: Path) -> None:
    """Eight requests in step need hardly more frames than one has tokens."""
    async with daemon(tmp_path, step_s=0.002) as (_, path), connected(path) as peer:
        await peer.say(HELLO, *(ask(f"{n}", "same", max_tokens=30) for n in range(8)))
        await peer.hear_end_of(*(f"{n}" for n in range(8)))
    assert all(peer.text(f"{n}") == text_after("same", 30) for n in range(8))
    assert sum(isinstance(m, Chunks) for m in peer.heard) <= 45


async def test_a_request_without_credit_waits_for_it(tmp_path: Path) -> None:
    """A request is parked when its credit is spent, beside one that is not, and goes on when credit comes."""
    async with daemon(tmp_path) as (engine, path), connected(path) as peer:
        await peer.say(HELLO, ask("slow", "x", max_tokens=40, credit=3), ask("quick", "y", max_tokens=40))
        await peer.hear_end_of("quick")
        await until(lambda: engine.status_now().requests.parked == 1)
        assert 3 <= len(peer.chunks("slow")) <= 10
        await peer.say(Credit(request_id="slow", chunks=100))
        await peer.hear_end_of("slow")
    assert peer.text("slow") == text_after("x", 40)


async def test_a_cancelled_request_ends_with_a_message_and_frees_its_pages(tmp_path: Path) -> None:
    """Cancel is answered by failed with the code of Cancelled; one that has ended already is nothing to cancel."""
    async with daemon(tmp_path, step_s=0.001) as (engine, path), connected(path) as peer:
        await peer.say(HELLO, ask("a", "x", max_tokens=500))
        await peer.hear(until_count=4)
        await peer.say(Cancel(request_id="a"), Cancel(request_id="a"), Cancel(request_id="never was"))
        await peer.hear_end_of("a")
        assert engine.status_now().pages.active == 0
        await peer.say(ask("a", "again"))  # the id is free again
        await peer.say(Query(query_id=1, kind="health"))
        await until(lambda: engine.status_now().requests.finished == 1)
    [failed] = [m for m in peer.heard if isinstance(m, Failed)]
    assert (failed.request_id, failed.code) == ("a", "cancelled")


async def test_a_client_that_is_gone_leaves_nothing(tmp_path: Path) -> None:
    """Hanging up or saying goodbye cancels what is under way; other connections notice nothing."""
    async with daemon(tmp_path, step_s=0.001) as (engine, path), connected(path) as other:
        await other.say(HELLO, ask("a", "other", max_tokens=200))
        for farewell in (True, False):
            async with connected(path) as peer:
                await peer.say(HELLO, ask("a", "x", max_tokens=500), ask("b", "y", max_tokens=500))
                await peer.hear(until_count=5)
                if farewell:
                    await peer.say(Goodbye())
                await peer.hang_up()
            await until(lambda: engine.status_now().requests.running <= 1)
        await other.hear_end_of("a")
        assert engine.status_now().pages.active == 0
        assert engine.status_now().requests.cancelled == 4
    assert other.text("a") == text_after("other", 200)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([Query(query_id=1, kind="status")], "invalid_format"),
        ([HELLO, HELLO], "invalid_format"),
        ([Hello(version=2)], "unsupported"),
        ([HELLO, ask("a", "x", max_tokens=900), ask("a", "y")], "invalid_format"),
        ([HELLO, ask("a", "x", max_tokens=900), Credit(request_id="a", chunks=-1)], "invalid_format"),
    ],
    ids=["no hello", "two hellos", "another version", "an id twice", "negative credit"],
)
async def test_who_breaks_the_protocol_is_told_and_cut_off(tmp_path: Path, messages: list[ClientMessage], code: str) -> None:
    """The last message says why, the connection is closed, and what it had under way is cancelled."""
    async with daemon(tmp_path) as (engine, path), connected(path) as peer:
        await peer.say(*messages)
        await peer.hear_all()
        assert engine.status_now().pages.active == 0
    last = peer.heard[-1]
    assert isinstance(last, Failed)
    assert (last.request_id, last.code) == ("", code)


async def test_a_wrong_request_fails_alone(tmp_path: Path) -> None:
    """What is wrong with one request is said under its id, with the code of the error; the others go on."""
    wrong = Submit(request_id="w", request=WireRequest(text="x", sampling=WireSampling(temperature=-1.0)), credit=9)
    none = Submit(request_id="n", request=WireRequest(), credit=9)
    async with daemon(tmp_path) as (_, path), connected(path) as peer:
        await peer.say(HELLO, wrong, none, ask("a", "x"))
        await peer.hear_end_of("w", "n", "a")
    failed = {m.request_id: m.code for m in peer.heard if isinstance(m, Failed)}
    assert failed == {"w": "request_validation_error", "n": "request_validation_error"}
    assert peer.text("a") == text_after("x", 10)


async def test_a_connection_has_so_many_requests_and_no_more(tmp_path: Path) -> None:
    """One more is refused with resource_exhausted, until another has ended."""
    limits = DaemonLimits(connection_requests=2)
    async with daemon(tmp_path, limits=limits, step_s=0.001) as (_, path), connected(path) as peer:
        await peer.say(HELLO, ask("a", "x", max_tokens=200), ask("b", "x", max_tokens=200), ask("c", "x"))
        await peer.hear_end_of("c")
        await peer.say(Cancel(request_id="a"))
        await peer.hear_end_of("a")
        await peer.say(ask("d", "x"))
        await peer.hear_end_of("d")
    failed = {m.request_id: m.code for m in peer.heard if isinstance(m, Failed)}
    assert failed == {"a": "cancelled", "c": "resource_exhausted"}


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    """More bytes than may wait for a client end its connection, and free what it had."""
    limits = DaemonLimits(connection_output_bytes=20_000)
    async with daemon(tmp_path, limits=limits) as (engine, path), connected(path) as peer:
        await peer.say(HELLO)
        with anyio.fail_after(20):
            while True:
                try:
                    await peer.say(*(Query(query_id=n, kind="status") for n in range(200)))
                except anyio.BrokenResourceError:
                    break
                await anyio.lowlevel.checkpoint()
        assert (await engine.infer("still here", max_tokens=5)).text == text_after("still here", 5)


async def test_another_uid_is_refused_before_a_byte_is_read(tmp_path: Path) -> None:
    """A connection from a uid that is not allowed gets permission_denied and nothing else."""
    async with daemon(tmp_path, uids=(os.getuid() + 1,)) as (_, path), connected(path) as peer:
        await peer.hear_all()
    [message] = peer.heard
    assert isinstance(message, Failed)
    assert message.code == "permission_denied"


async def test_reports_answer_queries(tmp_path: Path) -> None:
    """status, metrics and health come as JSON, under the number of their query."""
    async with daemon(tmp_path) as (_, path), connected(path) as peer:
        await peer.say(HELLO, Query(query_id=0, kind="status"))
        await peer.say(Query(query_id=1, kind="metrics"), Query(query_id=2, kind="health"))
        await peer.hear(until_count=4)
    reports = [m for m in peer.heard if isinstance(m, Report)]
    assert [m.query_id for m in reports] == [0, 1, 2]
    for report, word in zip(reports, ('"state"', '"steps"', '"healthy"'), strict=True):
        assert word in report.content


async def test_the_daemons_end_is_told(tmp_path: Path) -> None:
    """When the daemon ends, each request and then the connection get failed with cancelled."""
    async with anyio.create_task_group() as tasks:
        async with daemon(tmp_path, step_s=0.001) as (_, path):
            stream = await anyio.connect_unix(path)
            peer = Peer(stream)
            await peer.say(HELLO, ask("a", "x", max_tokens=900))
            await peer.hear(until_count=4)
            tasks.start_soon(peer.hear_all)
    await stream.aclose()
    assert [(m.request_id, m.code) for m in peer.heard if isinstance(m, Failed)] == [("a", "cancelled"), ("", "cancelled")]
