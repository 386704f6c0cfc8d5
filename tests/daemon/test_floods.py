"""Clients that say far too much, beside one that streams. The daemon is in a process of its own, so that what is measured is
its time and its memory."""

import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Cancel, Credit, Hello, Query, Report
from tests.daemon.attacks import HELLO, Process, RawClient, gaps_of_a_stream, pack, submit
from tests.daemon.test_session import ask
from tests.fakes.daemon import daemon_process, started
from tests.runtime.engines import until

pytestmark = [pytest.mark.proof, pytest.mark.usefixtures("unwatched")]

LONG = {"model": {"max_model_len": 100_000}}
STREAM = encode(ask("stream", "healthy", max_tokens=90_000, credit=10**6))
NUM_PAIRS = 20_000
_ENDS = tuple(pack("type") + pack(tag)[:7] for tag in ("failed", "finished"))  # both of the same length
# Ten times what is measured on a quiet machine of two cores, where a step takes 1 ms and a flooding connection's turn 3.
MAX_P99_S = 0.1
# Noise only makes gaps longer: a daemon that keeps the bound once keeps it, and one that does not will not at any try.
NUM_ATTEMPTS = 3
MIN_GAPS, MAX_ATTACKS = 20, 20
MAX_GROWTH_MIB = 80


def pairs(count: int, **sampling: object) -> bytes:
    """Requests that are cancelled as soon as they are submitted."""
    return b"".join(
        submit({"text": f"prompt {n}", "sampling": sampling}, f"{n}") + encode(Cancel(request_id=f"{n}"))
        for n in range(count)
    )


def flood(path: Path, payload: bytes, count: int) -> Callable[[], None]:
    """Say it all, then hear an end for each of ``count`` requests. They are counted and not decoded: twenty threads that
    compute would keep the stream's reader waiting, in this process, and it is the daemon that is measured."""

    def run() -> None:
        num_ended, rest = 0, b""
        with RawClient(path) as client:
            client.socket.sendall(HELLO + payload)
            while num_ended < count:
                data = client.socket.recv(1 << 20)
                assert data
                heard = rest + data
                num_ended += sum(heard.count(end) for end in _ENDS)
                rest = heard[-len(_ENDS[0]) + 1 :]

    return run


def at_once(attacks: list[Callable[[], None]]) -> Callable[[], None]:
    """Each in a thread of its own."""

    def run() -> None:
        threads = [threading.Thread(target=attack) for attack in attacks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def status(path: Path) -> str:
    with RawClient(path) as client:
        client.say(Hello(version=1), Query(query_id=0, kind="status"))
        while not (reports := [message.content for message in client.heard if isinstance(message, Report)]):
            assert client.hear()
        return reports[0]


async def until_clean(path: Path) -> None:
    """Until nothing is under way and no page is held."""
    clean = ('"running":0,"waiting":0,"parked":0', '"active":0')
    await until(lambda: all(text in status(path) for text in clean))


async def beside_a_stream(path: Path, attack: Callable[[], None]) -> None:
    """The attack, beside a stream that it must not slow down, in a daemon that it must not make larger."""
    limits = path.with_name("limits.toml")
    limits.parent.mkdir(mode=0o700)
    limits.write_text("[daemon.limits]\nconnection_output_bytes = 4_000_000\n")
    async with daemon_process(path, step_s=0.001, config=LONG, config_file=str(limits)) as child:
        process = Process(child.pid)
        before = process.num_descriptors, process.num_threads
        process.reset_peak()
        memory = process.rss_mib()
        for attempt in range(NUM_ATTEMPTS):
            p99_s = await p99_gap(path, attack)
            if p99_s < MAX_P99_S:
                break
            assert attempt < NUM_ATTEMPTS - 1, f"{p99_s:.3f} s between chunks"
        assert process.peak_mib() - memory < MAX_GROWTH_MIB
        await until_clean(path)
        # One more: the event loop opens a descriptor of its own after it has said that it is ready.
        await until(lambda: process.num_descriptors <= before[0] + 1 and process.num_threads == before[1])


async def p99_gap(path: Path, attack: Callable[[], None]) -> float:
    """Seconds between the stream's chunks, over so many attacks that there are enough of them."""
    gaps: list[float] = []
    for _ in range(MAX_ATTACKS):
        gaps += await gaps_of_a_stream(path, STREAM, attack)
        if len(gaps) >= MIN_GAPS:
            return sorted(gaps)[len(gaps) * 99 // 100]
    raise AssertionError(f"the stream stood still: {len(gaps)} chunks in {MAX_ATTACKS} attacks")


@pytest.mark.parametrize("num_connections", [1, 20])
async def test_requests_that_are_cancelled_at_once(tmp_path: Path, num_connections: int) -> None:
    """20,000 of them, on one connection or twenty, each get their end, and nothing of them is left."""
    count = NUM_PAIRS // num_connections
    attack = at_once([flood(tmp_path / "run" / "s", pairs(count), count) for _ in range(num_connections)])
    await beside_a_stream(tmp_path / "run" / "s", attack)


async def test_grammars_that_are_cancelled_at_once(tmp_path: Path) -> None:
    """So with requests whose output must have a form, which pass through one queue more."""
    payload = pairs(NUM_PAIRS, response_format=["json_schema", '{"type":"object"}'])
    await beside_a_stream(tmp_path / "run" / "s", flood(tmp_path / "run" / "s", payload, NUM_PAIRS))


async def test_credit_that_nobody_asked_for(tmp_path: Path) -> None:
    """100,000 grants, for a request that there is and for one that there is not."""
    grants = (encode(Credit(request_id="0", chunks=1)) + encode(Credit(request_id="none", chunks=1))) * 50_000
    start = submit({"text": "x", "sampling": {"max_tokens": 5}}, "0", credit=0)
    await beside_a_stream(tmp_path / "run" / "s", flood(tmp_path / "run" / "s", start + grants, 1))


async def test_queries_whose_answers_nobody_reads(tmp_path: Path) -> None:
    """A question is shorter than its answer: who asks on and on without reading is cut off, and costs a bounded amount."""
    path = tmp_path / "run" / "s"

    def attack() -> None:
        with RawClient(path) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.socket.sendall(HELLO)
            while True:
                client.socket.sendall(b"".join(encode(Query(query_id=n, kind="status")) for n in range(500)))

    await beside_a_stream(path, attack)


async def test_connections_that_come_and_go(tmp_path: Path) -> None:
    """2,000 of them, some with hello, some with nothing, some with half a frame."""
    path = tmp_path / "run" / "s"

    def attack() -> None:
        for n in range(2000):
            with RawClient(path) as client:
                client.socket.sendall((b"", HELLO, HELLO[:5], HELLO + STREAM, HELLO + STREAM[:9])[n % 5])

    await beside_a_stream(path, attack)


@pytest.fixture
def few_descriptors(tmp_path: Path) -> Path:
    script = tmp_path / "few"
    script.write_text('#!/bin/sh\nulimit -n 48 && exec "$@"\n')
    script.chmod(0o700)
    return script


async def test_want_of_descriptors_is_waited_out(tmp_path: Path, few_descriptors: Path) -> None:
    """With more connections than the daemon has descriptors, those inside are served, those outside wait, it does not spin,
    and when some leave the others come in."""
    path = tmp_path / "run" / "s"
    command = [str(few_descriptors), sys.executable, "-m", "tests.fakes.daemon", str(path), "{}"]
    async with started(command) as child:
        process = Process(child.pid)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(RawClient(path)) for _ in range(60)]
            for client in clients:
                client.socket.sendall(HELLO + encode(Query(query_id=1, kind="health")))
                client.socket.settimeout(0.05)
            inside = [client for client in clients if is_answered(client)]
            assert 10 < len(inside) < 48
            before = process.cpu_s
            await anyio.sleep(0.6)
            assert process.cpu_s - before < 0.2
            for client in inside:
                client.heard.clear()
                client.say(Query(query_id=2, kind="health"))
                assert is_answered(client)
            for client in inside:
                client.socket.close()
            outside = [client for client in clients if client not in inside]
            for client in outside:
                client.socket.settimeout(5)
                assert is_answered(client)


def is_answered(client: RawClient) -> bool:
    """Whether a report comes within a moment."""
    with contextlib.suppress(TimeoutError):
        while not any(isinstance(message, Report) for message in client.heard):
            assert client.hear()
        return True
    return False
