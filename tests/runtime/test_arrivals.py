"""The requests that an engine has had, as a trace: what it says of them, and what a simulation makes of it."""

import json
from functools import partial
from pathlib import Path

import anyio
import msgspec
import pytest

from ferrum_rt.interfaces.errors import BackendError, RequestValidationError, ResourceExhausted
from ferrum_rt.interfaces.types import Arrival, ClientId, Priority
from ferrum_rt.runtime import arrivals as arrivals_module
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.simulation.workload import read_trace
from tests.command_line import Cli
from tests.runtime.engines import fake_engine

ADA, BOB = ClientId("ada"), ClientId('"bob", é\u2028')


def write(arrivals: list[Arrival], path: Path) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(arrival) + b"\n" for arrival in arrivals))
    return path


async def serve_some(engine: Runtime) -> None:
    await engine.infer("secret", max_tokens=7, client_id=ADA, priority=Priority.HIGH, deadline_s=60.0)
    async with anyio.create_task_group() as tasks:
        for length in range(1, 6):
            tasks.start_soon(partial(engine.infer, "x" * length, max_tokens=3 * length, client_id=BOB))
    await engine.infer("sample", max_tokens=4, n=3)


def sizes(arrivals: list[Arrival]) -> list[tuple[int, int]]:
    return sorted((arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals)


async def test_a_trace_says_what_came() -> None:
    """Each request that ended is in it, in the order in which they came, the first at 0: its tokens, those of all samples
    together, its client, priority and deadline, and nothing of what it said."""
    async with fake_engine() as (engine, _):
        await serve_some(engine)
        arrivals = engine.arrivals()
    assert sizes(arrivals) == sorted([(6, 7), (6, 12), *((length, 3 * length) for length in range(1, 6))])
    times = [arrival.arrival_s for arrival in arrivals]
    assert times == sorted(times)
    assert times[0] == 0 < times[-1]
    first, last = arrivals[0], arrivals[-1]
    assert first == Arrival(
        arrival_s=0.0, prompt_tokens=6, output_tokens=7, client=ADA, priority=Priority.HIGH, deadline_s=60.0
    )
    assert (last.output_tokens, last.client, last.priority, last.deadline_s) == (12, "default", Priority.NORMAL, None)
    assert b"secret" not in msgspec.json.encode(arrivals)


async def test_a_simulation_sees_exactly_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written out and read by ``simulate --trace`` they are the same arrivals, and its report counts them."""
    async with fake_engine() as (engine, _):
        await serve_some(engine)
        arrivals = engine.arrivals()
    trace = write(arrivals, tmp_path / "trace.jsonl")
    assert read_trace(trace) == arrivals
    report = json.loads(Cli(capsys)("simulate", "--trace", str(trace), "--json").out)
    assert (report["requests"], report["finished"]) == (7, 7)
    assert report["prompt_tokens"] + report["cached_tokens"] == 6 + 15 + 6
    by_client = {client["client"]: (client["requests"], client["output_tokens"]) for client in report["clients"]}
    assert by_client == {ADA: (1, 7), BOB: (5, 45), "default": (1, 12)}


async def test_what_ended_early_was_work_and_what_was_refused_was_none() -> None:
    """A request that was cancelled, or failed, counts with the tokens that it got, at least one; one that is wrong, or for
    which there was no room, is not in it."""
    full = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with fake_engine(full, step_s=0.001, fail_at=[1]) as (engine, _):
        with pytest.raises(BackendError):
            await engine.infer("fails", max_tokens=50)
        with pytest.raises(RequestValidationError):
            await engine.infer("x" * 5000)
        with pytest.raises(RequestValidationError):
            await engine.infer([10**6])
        async with engine.infer_stream("first", max_tokens=900) as chunks, engine.infer_stream("second", max_tokens=900):
            await anext(chunks)
            with pytest.raises(ResourceExhausted):
                await engine.infer("third")
            await anext(chunks)
    fails, first, *rest = engine.arrivals()
    assert (fails.prompt_tokens, fails.output_tokens) == (5, 1)
    assert first.prompt_tokens == 5
    assert 2 <= first.output_tokens < 900
    assert sizes(rest) in ([], [(6, 1)])  # the second was tokenized, or not yet


async def test_what_was_never_tokenized_is_not_in_it() -> None:
    """Nobody knows how large a request was that its caller left at once."""
    async with fake_engine() as (engine, _):
        async with engine.infer_stream("gone"):
            pass
        await engine.infer("x", max_tokens=2)
        assert (await engine.status()).requests.cancelled == 1
        assert sizes(engine.arrivals()) == [(1, 2)]


async def test_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound the request that ended first goes; of those that are kept fewer can be asked for, the latest."""
    monkeypatch.setattr(arrivals_module, "MAX_ARRIVALS", 3)
    async with fake_engine() as (engine, _):
        assert engine.arrivals() == []
        for length in range(1, 6):
            await engine.infer("x" * length, max_tokens=1)
        assert sizes(engine.arrivals()) == [(3, 1), (4, 1), (5, 1)]
        latest = engine.arrivals(2)
    assert sizes(latest) == [(4, 1), (5, 1)]
    assert latest[0].arrival_s == 0
