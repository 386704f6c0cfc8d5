"""The real server on a real socket, against clients that say anything at any time. The long run is tools/fuzz_daemon.py."""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import uvloop
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Cancel, Credit, Goodbye, Hello, Query, Submit, WireRequest, WireSampling
from ferrum_rt.runtime.runtime import Runtime
from tests.daemon.line import Line
from tests.daemon.serving import daemon
from tests.ipc.frames import (
    ATTACKS,
    SESSIONS,
    broken_frame,
    large_attacks,
    odd_session_message,
    odd_submit,
    session_message,
)
from tests.runtime.engines import until

ROOT = Path(__file__).parents[2]
CORPUS = {file.name: file.read_bytes() for file in sorted((Path(__file__).parent / "corpus").iterdir())}
HELLO = encode(Hello(version=1, client="fuzz"))
# Few slots and pages, so that requests wait, are parked and are preempted.
CONFIG = {
    "scheduler": {"max_running_requests": 4, "max_waiting_requests": 8},
    "kv_cache": {"num_pages": 40, "block_size": 4},
    "batching": {"max_batched_tokens": 32},
}
LIMIT_S = 5.0
IDS = ("a", "b", "c", "d")

# Drawn at once: what a rule draws while it runs must not depend on how far the server has come.
randoms = st.integers(0, 2**32 - 1).map(Random)
ids = st.sampled_from(IDS)
numbers = st.integers(0, 3)
rough = st.integers(2, 3)


class Conversations(RuleBasedStateMachine):
    """Four clients, beside one that does no harm: two that keep to the protocol, whatever they ask for, and two that may
    not. Server and clients share an event loop, which runs within the rules only; each leaves it running for some turns."""

    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop

    def __init__(self) -> None:
        super().__init__()
        self.exits = ExitStack()
        self.loop = type(self).new_loop()
        self.exits.callback(self.loop.close)
        self.violations: list[str] = []  # told at the end: that a rule raises must not depend on the time either
        self.loop.set_exception_handler(lambda _, fault: self.violations.append(f"raised into the loop: {fault}"))
        self.folder = Path(self.exits.enter_context(tempfile.TemporaryDirectory()))
        self.lines: list[Line] = []
        self.deaf: set[int] = set()
        self.num_asked = 0
        self.engine: Runtime
        self._opened, self._closing = asyncio.Event(), asyncio.Event()
        self.server = self.loop.create_task(self._serve())
        self.run(self._opened.wait())
        self.healthy = Line(self.folder / "s")
        self.healthy.say(HELLO)

    async def _serve(self) -> None:
        limits = DaemonLimits(connection_output_bytes=100_000)
        async with daemon(self.folder, limits=limits, config=CONFIG) as (self.engine, _):
            self._opened.set()
            await self._closing.wait()

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        async def limited() -> None:
            with anyio.move_on_after(LIMIT_S) as scope:
                await work
            if scope.cancelled_caught:
                self.violations.append(f"still waiting after {LIMIT_S:g} s")

        self.loop.run_until_complete(limited())

    async def turns(self, count: int) -> None:
        """Let the server work, and hear what it says."""
        for _ in range(count):
            await anyio.lowlevel.checkpoint()
            self._pump()

    def _pump(self) -> None:
        for line in (self.healthy, *self.lines):
            if not line.is_over:
                try:
                    line.pump(is_reading=id(line) not in self.deaf)
                except (AssertionError, InvalidFormat) as error:
                    self.violations.append(str(error))
                    line.hang_up()

    def until(self, condition: Callable[[], bool]) -> None:
        def is_so() -> bool:
            self._pump()
            return condition() or bool(self.violations)

        self.run(until(is_so))

    def unused(self, number: int, request_id: str) -> str:
        """The id, or for a client that keeps to the protocol one that is not in use."""
        waiting = self.lines[number].ledger.waiting
        return request_id if number >= 2 or request_id not in waiting else self._next_id()

    def _next_id(self) -> str:
        self.num_asked += 1
        return f"n{self.num_asked}"

    def say(self, number: int, data: bytes, *, is_right: bool = False) -> None:
        if self.lines[number].is_over or self.lines[number].is_shut:
            if number < 2:
                self.violations.append("a client that keeps to the protocol was cut off")
                return
            self.reconnect(number)
        self.lines[number].say(data, is_right=is_right)
        self.run(self.turns(2))

    # -- what the clients do ------------------------------------------------------------------------------------------

    @initialize(credits_given=st.tuples(*[st.sampled_from((0, 3, 1000))] * 4))
    def connect(self, credits_given: tuple[int, ...]) -> None:
        for number, credit in enumerate(credits_given):
            self.lines.append(Line(self.folder / "s"))
            self.say(number, HELLO + self.plain("a", credit), is_right=True)
        self.run(self.turns(20))

    def plain(self, request_id: str, credit: int) -> bytes:
        request = WireRequest(text="plain", sampling=WireSampling(max_tokens=30))
        return encode(Submit(request_id=request_id, request=request, credit=credit))

    @rule(number=rough, says_hello=st.booleans())
    def connect_again(self, number: int, says_hello: bool) -> None:
        """The connection is given up; a new one takes its place."""
        self.lines[number].hang_up()
        self.lines[number] = Line(self.folder / "s")
        if says_hello:
            self.lines[number].say(HELLO)

    def reconnect(self, number: int) -> None:
        """With requests under way, for what comes next to hurt."""
        self.connect_again(number, says_hello=False)
        self.lines[number].say(HELLO + self.plain("a", 3) + self.plain("b", 1000), is_right=True)
        self.run(self.turns(5))

    @rule(number=rough)
    def hello(self, number: int) -> None:
        self.say(number, HELLO)

    @rule(
        number=numbers,
        request_id=ids,
        text=st.text("ab é", min_size=1, max_size=30),
        max_tokens=st.integers(1, 60),
        n=st.sampled_from((1, 1, 1, 2, 4)),
        credit=st.sampled_from((0, 1, 3, 10, 1000)),
        stop=st.lists(st.text("aeiou ", min_size=1, max_size=2), max_size=2),
        prompt_logprobs=st.booleans(),
        session_id=st.none() | st.sampled_from(SESSIONS),
    )
    def submit(
        self,
        number: int,
        request_id: str,
        text: str,
        max_tokens: int,
        n: int,
        credit: int,
        stop: list[str],
        prompt_logprobs: bool,
        session_id: str | None,
    ) -> None:
        # The fake scores no prompt, so that such a request fails.
        sampling = WireSampling(
            max_tokens=max_tokens, n=n, stop=stop, prompt_logprobs=3 if prompt_logprobs and not stop else None
        )
        request = WireRequest(text=text, sampling=sampling, session_id=session_id)
        message = Submit(request_id=self.unused(number, request_id), request=request, credit=credit)
        self.say(number, encode(message), is_right=sampling.prompt_logprobs is None)

    @rule(number=numbers, request_id=ids, rng=randoms)
    def submit_wrongly(self, number: int, request_id: str, rng: Random) -> None:
        self.say(number, encode(odd_submit(rng, self.unused(number, request_id))))

    @rule(number=numbers, request_id=ids, chunks=st.sampled_from((0, 1, 5, 100, 2**64 - 1)))
    def credit(self, number: int, request_id: str, chunks: int) -> None:
        self.say(number, encode(Credit(request_id=request_id, chunks=chunks)))

    @rule(number=rough, request_id=ids | st.just(""), rng=randoms)
    def break_the_protocol(self, number: int, request_id: str, rng: Random) -> None:
        """In what the decoder takes: an id in use, or none; negative credit."""
        submit = odd_submit(rng, request_id)
        self.say(number, encode(rng.choice((submit, Credit(request_id=request_id, chunks=-1)))))

    @rule(number=numbers, request_id=ids)
    def cancel(self, number: int, request_id: str) -> None:
        self.say(number, encode(Cancel(request_id=request_id)))

    @rule(
        number=numbers,
        kind=st.sampled_from(("status", "metrics", "health", "arrivals", "diagnostics")),
        count=st.sampled_from((1, 2, 50)),
    )
    def query(self, number: int, kind: Any, count: int) -> None:
        self.say(number, b"".join(encode(Query(query_id=at, kind=kind)) for at in range(count)))

    @rule(number=numbers, rng=randoms, is_odd=st.booleans())
    def change_sessions(self, number: int, rng: Random, is_odd: bool) -> None:
        self.say(number, encode(odd_session_message(rng) if is_odd else session_message(rng, 7)))

    @rule(number=rough)
    def flood(self, number: int) -> None:
        """More is asked than may wait for a client that does not read."""
        self.say(number, b"".join(encode(Query(query_id=at, kind="status")) for at in range(700)))

    @rule(number=rough)
    def goodbye(self, number: int) -> None:
        self.say(number, encode(Goodbye()))

    @rule(number=rough)
    def half_close(self, number: int) -> None:
        if not self.lines[number].is_over:
            self.lines[number].half_close()
        self.run(self.turns(2))

    @rule(number=rough)
    def hang_up(self, number: int) -> None:
        self.lines[number].hang_up()
        self.run(self.turns(2))

    @rule(number=rough, rng=randoms)
    def garble(self, number: int, rng: Random) -> None:
        self.say(number, broken_frame(rng))

    @rule(number=rough, noise=st.binary(min_size=1, max_size=30))
    def babble(self, number: int, noise: bytes) -> None:
        self.say(number, noise)

    @rule(number=rough, request_id=ids, share=st.floats(0, 1))
    def break_off(self, number: int, request_id: str, share: float) -> None:
        """A frame in two pieces, if nobody comes between."""
        data = encode(Submit(request_id=request_id, request=WireRequest(text="half"), credit=1000))
        cut = int(share * len(data))
        self.say(number, data[:cut])
        self.say(number, data[cut:])

    @rule(number=rough, request_id=ids, share=st.floats(0, 1))
    def leave_off(self, number: int, request_id: str, share: float) -> None:
        """A piece of a frame."""
        data = encode(Cancel(request_id=request_id))
        self.say(number, data[: int(share * len(data))])

    @rule(number=rough)
    def stop_or_go_on_reading(self, number: int) -> None:
        self.deaf ^= {id(self.lines[number])}

    @rule(count=st.sampled_from((5, 50, 300)))
    def wait(self, count: int) -> None:
        self.run(self.turns(count))

    @rule()
    def somebody_else_is_answered(self) -> None:
        """Whatever the others do, and the engine being full is told."""
        self.num_asked += 1
        ledger = self.healthy.ledger
        self.healthy.say(encode(Query(query_id=self.num_asked, kind="health")))
        self.until(lambda: not ledger.num_queries)
        if '"healthy":true' not in ledger.report:
            self.violations.append(ledger.report)
        sampling = WireSampling(max_tokens=5)
        submit = Submit(request_id="h", request=WireRequest(text="still there?", sampling=sampling, priority=3), credit=100)
        self.healthy.say(encode(submit), is_right=True)
        self.until(lambda: not ledger.waiting)

    # -- the end ------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.deaf.clear()
            for line in self.lines:
                self._bring_to_an_end(line)
            self.until(lambda: all(self._has_ended(line) for line in self.lines))
            if any(line.is_over for line in (self.healthy, *self.lines[:2])):
                self.violations.append("a client that keeps to the protocol was cut off")
            self._hang_up_all()
            self.until(self._is_idle)
            assert not self.violations, self.violations
        finally:
            self._hang_up_all()
            self._closing.set()
            self.loop.run_until_complete(asyncio.wait([self.server]))
            self.exits.close()
        self.server.result()

    def _bring_to_an_end(self, line: Line) -> None:
        """Every request gets its last message: those that want for nothing but credit get it, the others are cancelled."""
        if line.is_over or line.ledger.is_ending:
            return
        if line.has_half_a_frame:
            line.half_close()
            return
        if not line.ledger.is_greeted:
            line.say(HELLO)
        right = set(line.ledger.waiting_right)
        for request_id in line.ledger.waiting:
            message = Credit(request_id=request_id, chunks=1000) if request_id in right else Cancel(request_id=request_id)
            line.say(encode(message))

    def _has_ended(self, line: Line) -> bool:
        return line.is_over or not (line.ledger.is_ending or line.ledger.waiting or line.ledger.num_queries)

    def _is_idle(self) -> bool:
        status = self.engine.status_now()
        requests = status.requests
        return not (requests.running or requests.waiting or requests.parked or status.pages.active)

    def _hang_up_all(self) -> None:
        for line in (*self.lines, self.healthy):
            if not line.is_over:
                line.hang_up()
            line.socket.close()


class UvloopConversations(Conversations):
    """The same on the event loop that the daemon runs on."""

    new_loop = staticmethod(uvloop.new_event_loop)


@pytest.mark.proof
@pytest.mark.parametrize("machine", [Conversations, UvloopConversations])
def test_conversations(machine: type[Conversations]) -> None:
    """Whatever several clients say, the protocol is kept with each of them, somebody else is answered, nothing is raised
    into the event loop, and when they are gone nothing is under way. A longer run: tools/fuzz_daemon.py --walks 10000."""
    walk(machine, 120)


def walk(machine: type[Conversations], count: int, *, shrinks: bool = False) -> None:
    """``count`` conversations of forty rules each. One that goes wrong is shown as it is, or ``shrinks`` to the least that
    does, which takes minutes."""
    phases = tuple(phase for phase in Phase if shrinks or phase not in (Phase.shrink, Phase.explain))
    every = list(HealthCheck)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count, stateful_step_count=40, deadline=None, phases=phases, suppress_health_check=every
        ),
    )


async def replay(engine: Runtime, path: Path, data: bytes) -> Line:
    """Say it all on a connection of its own, and leave. Whatever it was, the daemon keeps to the protocol, answers another
    client, and is left with nothing."""
    line, healthy = Line(path), Line(path)
    line.say(data)
    submit = Submit(
        request_id="h", request=WireRequest(text="still there?", sampling=WireSampling(max_tokens=5)), credit=100
    )
    healthy.say(HELLO + encode(submit), is_right=True)

    def has_ended() -> bool:
        line.pump()
        healthy.pump()
        return (line.is_over or not (line.unsent or line.ledger.is_ending)) and not healthy.ledger.waiting

    try:
        await until(has_ended)
        assert not healthy.is_over
    finally:
        line.hang_up()
        healthy.hang_up()
    await until(lambda: not (engine.status_now().requests.running or engine.status_now().pages.active))
    return line


@pytest.mark.parametrize("name", CORPUS)
async def test_the_corpus(name: str, tmp_path: Path) -> None:
    """Each stream that once did harm, or could have: cut off with a reason, or answered."""
    async with daemon(tmp_path) as (engine, path):
        await replay(engine, path, CORPUS[name])


async def test_an_attack_ends_its_connection(tmp_path: Path) -> None:
    """Each is met with the reason as the last message, beside a request that is under way, and nobody else is hurt."""
    async with daemon(tmp_path) as (engine, path):
        for name, attack in ATTACKS.items():
            line = await replay(engine, path, HELLO + attack)
            assert line.ledger.is_cut, name


@pytest.mark.slow
async def test_a_large_attack_ends_its_connection(tmp_path: Path) -> None:
    """So does depth in any field, or millions of nothings."""
    async with daemon(tmp_path) as (engine, path):
        for name, attack in large_attacks().items():
            line = await replay(engine, path, HELLO + attack)
            assert line.ledger.is_cut, name


@pytest.mark.proof
@pytest.mark.usefixtures("unwatched")
def test_the_long_run_in_short(tmp_path: Path) -> None:
    """tools/fuzz_daemon.py finds nothing, and says so in JSON; it has sent what it was told to, most of it hostile."""
    command = [sys.executable, "-m", "tools.fuzz_daemon", "--frames", "1500", "--corpus", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, report["violations"]) == (0, [])
    assert report["frames"] >= 1500
    assert 0.5 < report["hostile"] / report["frames"] < 0.9
    assert report["cut"] > 50
    assert report["answers"] >= 2
    assert not list(tmp_path.iterdir())
