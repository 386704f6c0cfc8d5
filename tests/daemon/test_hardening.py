"""Clients that do not behave: too slow, half gone, deaf, or without an end."""

import asyncio
import gc
import os
import socket
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_rt.daemon import outbox
from ferrum_rt.daemon import session as sessions
from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.server import Server
from ferrum_rt.daemon.session import CLOSE_LIMIT_S, HELLO_LIMIT_S, Session
from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.interfaces.model_executor import PrefillOutput, StepInput, StepOutput
from ferrum_rt.interfaces.sampler import TokenScores
from ferrum_rt.interfaces.types import RequestId, StreamChunk, TokenId
from ferrum_rt.ipc.framing import encode, server_decoder
from ferrum_rt.ipc.messages import (
    Cancel,
    Chunks,
    Credit,
    Failed,
    Finished,
    Goodbye,
    Query,
    Submit,
    Welcome,
    WireRequest,
    WireSampling,
)
from ferrum_rt.runtime.threads.worker import finished
from tests.daemon.serving import server
from tests.daemon.test_session import HELLO, Peer, ask, connected
from tests.fakes.executor import FakeExecutor
from tests.runtime.engines import text_after, until

FOREVER = {"model": {"max_model_len": 100_000}}


class Clock:
    """Makes the server's checks as if it were later."""

    def __init__(self, serving: Server) -> None:
        self._serving, self._ahead_s = serving, 0.0

    def pass_s(self, seconds: float) -> None:
        self._ahead_s += seconds
        for session in list(self._serving._sessions):
            session.check(asyncio.get_running_loop().time() + self._ahead_s)


def raw_client(path: Path) -> socket.socket:
    """One that reads nothing unless told to."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.setblocking(False)
    return client


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def last_failure(peer: Peer) -> Failed:
    assert isinstance(peer.heard[-1], Failed)
    return peer.heard[-1]


# -- too slow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", encode(HELLO)[:-1]], ids=["nothing", "all of hello but a byte"])
async def test_who_does_not_say_hello_in_time_is_cut_off(tmp_path: Path, said: bytes) -> None:
    """However many bytes of it came, and however recently."""
    async with server(tmp_path) as (_, path, serving), connected(path) as peer:
        await until(lambda: serving.num_connections == 1)
        clock = Clock(serving)
        for byte in said:
            await peer._stream.send(bytes([byte]))
        clock.pass_s(HELLO_LIMIT_S - 0.5)
        assert serving.num_connections == 1
        clock.pass_s(1.0)
        await peer.hear_all()
        await until(lambda: serving.num_connections == 0)
    assert last_failure(peer).code == "invalid_format"


async def test_bytes_may_come_one_at_a_time(tmp_path: Path) -> None:
    """A frame is a frame, in however many pieces it comes."""
    async with server(tmp_path) as (_, path, _), connected(path) as peer:
        for byte in encode(HELLO) + encode(ask("a", "x")):
            await peer._stream.send(bytes([byte]))
            await anyio.lowlevel.checkpoint()
        await peer.hear_end_of("a")
    assert peer.text("a") == text_after("x", 10)


async def test_a_frame_that_is_not_finished_ends_its_connection(tmp_path: Path) -> None:
    """After ``stall_s``, though a byte of it comes now and then; one who finishes frames in time is left alone."""
    frame = encode(Query(query_id=1, kind="health"))
    async with server(tmp_path, limits=DaemonLimits(stall_s=10)) as (_, path, serving):
        async with connected(path) as slow, connected(path) as steady:
            clock = Clock(serving)
            await slow.say(HELLO)
            await steady.say(HELLO)
            await slow.hear(until_count=1)
            await steady.hear(until_count=1)
            for step in range(5):  # the slow one adds a byte each time; the steady one finishes a frame each time
                await slow._stream.send(frame[step : step + 1])
                await steady._stream.send(frame[:7])
                await until(lambda: all(session._decoder.num_held_bytes for session in serving._sessions))
                clock.pass_s(3)
                await steady._stream.send(frame[7:])
                await steady.hear(until_count=2 + step)
            await slow.hear_all()
            await until(lambda: serving.num_connections == 1)
    assert "not finished within 10 s" in last_failure(slow).message


# -- deaf -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_client_that_reads_nothing_is_cut_off_in_time(tmp_path: Path) -> None:
    """Output that nobody reads for ``stall_s`` ends the connection, though the client has credit and goes on talking; if it
    does not read why, its descriptor is free after CLOSE_LIMIT_S. Meanwhile others are served."""
    limits = DaemonLimits(stall_s=10)
    async with server(tmp_path, limits=limits, config=FOREVER) as (engine, path, serving), connected(path) as other:
        await other.say(HELLO)
        await other.hear(until_count=1)
        before = num_descriptors()
        with raw_client(path) as deaf:
            request = ask("a", "x", max_tokens=90_000, credit=10**6)
            deaf.send(encode(HELLO) + encode(request))
            await until(lambda: any(session._transport.get_write_buffer_size() for session in serving._sessions))
            clock = Clock(serving)
            for _ in range(4):
                clock.pass_s(3)
                deaf.send(encode(Credit(request_id="a", chunks=1)))
                await anyio.lowlevel.checkpoint()
            clock.pass_s(3)
            assert engine.status_now().requests.running == 0
            assert engine.status_now().pages.active == 0
            assert serving.num_connections == 2  # it may still read why
            clock.pass_s(CLOSE_LIMIT_S + 0.1)
            await until(lambda: serving.num_connections == 1)
            assert num_descriptors() == before + 1  # that of ``deaf``
        await other.say(ask("b", "y"))
        await other.hear_end_of("b")
    assert other.text("b") == text_after("y", 10)


async def read_a_little(client: socket.socket, session: Session) -> None:
    """And wait until the daemon could send more because of it."""

    def num_sent() -> int:
        return session.outbox.num_written - session.outbox.num_waiting_bytes

    before = num_sent()
    client.recv(1 << 20)
    await until(lambda: num_sent() > before)


@pytest.mark.slow
async def test_a_client_that_reads_a_little_is_left_alone(tmp_path: Path) -> None:
    """Whoever reads something between two checks is slow, not deaf."""
    limits = DaemonLimits(stall_s=10)
    async with server(tmp_path, limits=limits, config=FOREVER) as (_, path, serving):
        with raw_client(path) as client:
            client.send(encode(HELLO) + encode(ask("a", "x", max_tokens=90_000, credit=10**6)))
            await until(lambda: any(session._transport.get_write_buffer_size() for session in serving._sessions))
            clock = Clock(serving)
            [session] = serving._sessions
            for _ in range(10):
                await read_a_little(client, session)
                clock.pass_s(6)
            assert serving.num_connections == 1


@pytest.mark.slow
async def test_chunks_that_are_not_read_end_their_connection(tmp_path: Path) -> None:
    """More bytes than ``connection_output_bytes`` waiting for a client with all the credit in the world are its end."""
    limits = DaemonLimits(connection_output_bytes=10_000)
    async with server(tmp_path, limits=limits, config=FOREVER) as (engine, path, _):
        with raw_client(path) as deaf:
            deaf.send(encode(HELLO) + b"".join(encode(ask(f"{n}", "x", max_tokens=90_000, credit=10**6)) for n in range(32)))
            await until(lambda: engine.status_now().requests.cancelled == 32)
        assert engine.status_now().pages.active == 0
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)


# -- half gone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_deaf", [False, True])
async def test_who_will_say_nothing_more_is_gone(tmp_path: Path, is_deaf: bool) -> None:
    """A client that shuts its sending side down can give no credit: its requests end at once, whether or not it reads, and
    its descriptor is free at the latest after CLOSE_LIMIT_S."""
    async with server(tmp_path, config=FOREVER) as (engine, path, serving):
        with raw_client(path) as client:
            client.send(encode(HELLO) + encode(ask("a", "x", max_tokens=90_000, credit=10**6 if is_deaf else 50)))
            [session] = [await the_session(serving)]
            if is_deaf:
                await until(lambda: session._transport.get_write_buffer_size() > 0)
            else:
                await until(lambda: engine.status_now().requests.parked == 1)
            client.shutdown(socket.SHUT_WR)
            await until(lambda: engine.status_now().requests.cancelled == 1)
            assert engine.status_now().pages.active == 0
            Clock(serving).pass_s(CLOSE_LIMIT_S + 0.1)
            await until(lambda: serving.num_connections == 0)


async def the_session(serving: Server) -> sessions.Session:
    await until(lambda: serving.num_connections == 1)
    [session] = serving._sessions
    return session


@pytest.mark.slow
async def test_who_says_goodbye_and_does_not_read_is_closed(tmp_path: Path) -> None:
    """What it does not read within CLOSE_LIMIT_S it never will."""
    async with server(tmp_path, config=FOREVER) as (engine, path, serving):
        with raw_client(path) as client:
            client.send(encode(HELLO) + encode(ask("a", "x", max_tokens=90_000, credit=10**6)))
            session = await the_session(serving)
            await until(lambda: session._transport.get_write_buffer_size() > 0)
            client.send(encode(Goodbye()))
            await until(lambda: engine.status_now().requests.cancelled == 1)
            Clock(serving).pass_s(CLOSE_LIMIT_S + 0.1)
            await until(lambda: serving.num_connections == 0)


# -- ids ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [ask("", "x"), ask("a", "x", credit=-1)],
    ids=["no request_id", "a negative credit"],
)
async def test_a_submit_that_cannot_be_answered_ends_the_connection(tmp_path: Path, wrong: Submit) -> None:
    """An answer under no id would be the connection's, and less than no credit is none."""
    async with server(tmp_path) as (_, path, _), connected(path) as peer:
        await peer.say(HELLO, wrong)
        await peer.hear_all()
    assert last_failure(peer).code == "invalid_format"


async def test_ids_of_two_connections_never_meet(tmp_path: Path) -> None:
    """Each connection has its own, whatever they are made of."""
    names = ["a", "1/a", "2/a", "/", "0", "\U0001f600" * 60, "1/1/a"]
    async with server(tmp_path) as (_, path, _), connected(path) as one, connected(path) as two:
        for peer in (one, two):
            await peer.say(HELLO, *(ask(name, f"prompt {name}") for name in names))
        for peer in (one, two):
            await peer.hear_end_of(*names)
            for name in names:
                assert peer.text(name) == text_after(f"prompt {name}", 10)


async def test_an_id_is_the_clients_own_affair(tmp_path: Path) -> None:
    """Control characters in it do no harm: it is sent back and used for nothing else."""
    async with server(tmp_path) as (_, path, _), connected(path) as peer:
        await peer.say(HELLO, ask("a\x1b[2J\n", "x"), ask("b", "x"))
        await peer.hear_end_of("a\x1b[2J\n", "b")
    assert peer.text("a\x1b[2J\n") == peer.text("b") == text_after("x", 10)


@pytest.mark.slow
async def test_a_request_that_has_ended_is_freed_without_a_collection(tmp_path: Path) -> None:
    """Nothing of it is a cycle: under a flood the collections would stop everybody, each for as long as a hundred steps."""
    gc.collect()
    gc.disable()
    try:
        async with server(tmp_path) as (engine, path, _), connected(path) as peer:
            await peer.say(HELLO, ask("a", "x"), ask("b", "x", max_tokens=900, credit=1))
            await until(lambda: len(engine._active) == 2)
            alive = [weakref.ref(generation.sink) for generation in engine._active.values()]
            await peer.say(Cancel(request_id="b"))
            await peer.say(ask("c", "x"))  # the tokenizer's task still has the ones before in hand
            await peer.hear_end_of("a", "b", "c")
            await until(lambda: all(sink() is None for sink in alive))
    finally:
        gc.enable()


async def test_credit_does_not_overflow(tmp_path: Path) -> None:
    """The largest integers that msgpack has are as good as any large credit."""
    async with server(tmp_path) as (_, path, _), connected(path) as peer:
        await peer.say(HELLO, ask("a", "x", max_tokens=50, credit=2**64 - 1))
        await peer.say(*(Credit(request_id="a", chunks=2**64 - 1) for _ in range(50)))
        await peer.hear_end_of("a")
    assert peer.text("a") == text_after("x", 50)


# -- too much for a frame -------------------------------------------------------------------------------------------------


class ScoringExecutor(FakeExecutor):
    """One that scores prompts, with 20 alternatives for each token."""

    def execute(self, step: StepInput) -> Future[StepOutput]:
        output = super().execute(step).result()
        scores = TokenScores([TokenId(n) for n in range(65, 86)], [-1.0] * 21)
        prefills = [
            PrefillOutput(done.sampled, [scores] * (len(item.token_ids) - (item.token_after is None)))
            for done, item in zip(output.prefills, step.batch.prefills, strict=True)
        ]
        return finished(StepOutput(output.decodes, prefills))


async def test_prompt_scores_too_large_for_a_frame_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is told to ask for fewer; one whose scores fit gets them, and the one beside it all that it asked for."""
    monkeypatch.setattr("ferrum_rt.ipc.framing.MAX_FRAME_BYTES", 20_000)
    monkeypatch.setattr("tests.runtime.engines.FakeExecutor", ScoringExecutor)

    def scored(request_id: str, length: int) -> Submit:
        sampling = WireSampling(max_tokens=5, prompt_logprobs=20)
        return Submit(request_id=request_id, request=WireRequest(text="p" * length, sampling=sampling), credit=99)

    async with server(tmp_path) as (engine, path, _), connected(path) as peer:
        await peer.say(HELLO, scored("large", 400), scored("small", 5), ask("plain", "x", max_tokens=40))
        await peer.hear_end_of("large", "small", "plain")
        assert engine.status_now().pages.active == 0
    [failed] = [message for message in peer.heard if isinstance(message, Failed)]
    assert (failed.request_id, failed.code) == ("large", "resource_exhausted")
    assert failed.message.startswith("prompt_logprobs")
    assert len(peer.chunks("small")[0].prompt_logprobs or ()) == 5
    assert peer.text("plain") == text_after("x", 40)
    assert sum(isinstance(message, Finished) for message in peer.heard) == 2


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_chunks_are_split_over_as_many_frames_as_it_takes(lengths: list[int]) -> None:
    """They come out in their order, and no frame is longer than it may be."""
    chunks = [StreamChunk(request_id=RequestId(f"{n}"), text="x" * length) for n, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ferrum_rt.ipc.framing.MAX_FRAME_BYTES", 400)
        frames = outbox.frames_of(Chunks(chunks=chunks))
    messages = list(server_decoder(400).feed(frames))  # which takes no longer one
    assert [chunk for message in messages if isinstance(message, Chunks) for chunk in message.chunks] == chunks


def test_a_chunk_that_no_frame_can_hold_is_an_error() -> None:
    """Splitting ends at a single chunk."""
    chunks = [StreamChunk(request_id=RequestId("a")), StreamChunk(request_id=RequestId("b"), text="x" * 500)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ferrum_rt.ipc.framing.MAX_FRAME_BYTES", 400)
        with pytest.raises(InvalidFormat):
            outbox.frames_of(Chunks(chunks=chunks))


async def test_the_reason_given_to_a_client_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of whatever length reaches the client, cut, and does not stop what else is on its way to it."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InvalidFormat("long " * 1_000_000)

    async with server(tmp_path) as (_, path, _), connected(path) as peer:
        await peer.say(HELLO)
        await peer.hear(until_count=1)
        with monkeypatch.context() as patched:
            patched.setattr(sessions, "from_wire", refuse)
            await peer.say(ask("a", "x"))
            await peer.hear_end_of("a")
        await peer.say(ask("b", "x"))
        await peer.hear_end_of("b")
    assert isinstance(peer.heard[0], Welcome)
    [failed] = [message for message in peer.heard if isinstance(message, Failed)]
    assert (failed.request_id, len(failed.message)) == ("a", 2000)
    assert peer.text("b") == text_after("x", 10)
