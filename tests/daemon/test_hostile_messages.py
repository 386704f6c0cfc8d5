"""Messages made to cost the daemon more than they cost their sender. One daemon, in a process of its own, takes them all."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from anyio.from_thread import start_blocking_portal

from ferrum_rt.ipc.messages import Failed
from tests.daemon.attacks import HELLO, NO_MESSAGES, NO_REQUESTS, Process, RawClient, longest_wait, submit
from tests.fakes.daemon import daemon_process
from tests.machine import seconds_here

pytestmark = pytest.mark.slow

# Far above what is measured on a quiet machine: 40 ms, and 60 MiB, which are the fake tokenizer's ids for 4 MiB of text.
MAX_WAIT_S = 0.1
MAX_PEAK_MIB = 100


class Target(NamedTuple):
    path: Path
    process: Process


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    path = tmp_path_factory.mktemp("daemon") / "run" / "s"
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(daemon_process(path)) as process:
        yield Target(path, Process(process.pid))


async def survive(target: Target, payload: bytes, request_id: str) -> Failed:
    """What the sender is told. Nobody else waits for long: of three tries the best counts, as other programs only add to
    one."""
    target.process.reset_peak()
    before, waits, told = target.process.rss_mib(), list[float](), list[Failed]()

    def attack() -> None:
        with RawClient(target.path) as client:
            try:
                client.socket.sendall(HELLO + payload)
            except (BrokenPipeError, ConnectionResetError):
                assert not request_id  # cut off before it had said everything
            end = client.hear_end(request_id)
            assert isinstance(end, Failed)
            told.append(end)

    while len(waits) < 3 and min(waits, default=1.0) > MAX_WAIT_S:
        waits.append(await longest_wait(target.path, attack))
    assert min(waits) < MAX_WAIT_S
    assert target.process.peak_mib() - before < MAX_PEAK_MIB
    return told[-1]


@pytest.mark.parametrize("name", NO_MESSAGES)
async def test_what_is_no_message_ends_its_connection(target: Target, name: str) -> None:
    """Its sender is told so in a few words; nobody waits for it to be found out, and no room is made for what it only
    promises."""
    failed = await survive(target, NO_MESSAGES[name], "")
    assert failed.code == "invalid_format"
    assert 20 < len(failed.message) <= 2000


@pytest.mark.parametrize("name", NO_REQUESTS)
async def test_a_request_that_cannot_be_served_fails_alone(target: Target, name: str) -> None:
    """Its sender is told what is wrong with it, under its id, and may go on; nobody waits for it to be found out."""
    failed = await survive(target, submit(NO_REQUESTS[name]), "a")
    assert failed.code in ("request_validation_error", "invalid_format", "unsupported")
    assert 20 < len(failed.message) <= 2000


async def test_many_such_messages_at_once_take_turns(target: Target) -> None:
    """Thirty-two of the costliest in one go keep others waiting no longer than a few of them take."""
    costly = b"".join(submit({"messages": [{"role": "x"}] * 4000}, f"{n}") for n in range(32))

    def attack() -> None:
        with RawClient(target.path) as client:
            client.socket.sendall(HELLO + costly)
            for n in range(32):
                client.hear_end(f"{n}")

    waits = [await longest_wait(target.path, attack) for _ in range(2)]
    assert min(waits) < seconds_here(0.2)
