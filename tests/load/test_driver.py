"""Loads that are put on targets: when requests go out, what their users are said to have waited, and what is left behind."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import BackendError
from ferrum_rt.interfaces.types import EngineState, PageCounts, RequestCounts
from ferrum_rt.load import driver
from ferrum_rt.load.driver import put_on
from ferrum_rt.load.measures import summarize
from ferrum_rt.load.results import Limits
from ferrum_rt.load.spans import SpanRecorder, belonging, faults, num_untraced, request_trees
from ferrum_rt.load.targets import EngineTarget, TargetError
from ferrum_rt.load.workload import LoadRequest
from tests.load.fakes import FakeTarget, ignore, load_requests, run_load, run_now
from tests.runtime.engines import fake_engine, until

COUNTS = RequestCounts(running=3, waiting=2, parked=1, finished=0, failed=0, cancelled=0, rejected=0)
PAGES = PageCounts(total=9, free=4, active=3, cached=2)

# -- the open loop --------------------------------------------------------------------------------------------------------


async def test_who_was_due_while_the_target_stood_still_has_waited() -> None:
    """Requests go out when they are due although none before them is answered, and what the target made each of them wait is
    in its time and in the p99. A load that waited for answers would send a hundred fewer, and never end here."""
    first, last = 20, 120
    moves = anyio.Event()

    async def stand_still(request: LoadRequest) -> None:
        if request.index == last:
            moves.set()
        if request.index >= first:
            await moves.wait()

    repeat = await run_load(FakeTarget(stand_still), load_requests(150, every_s=0.001))

    moved_at = repeat.requests[last].sent_s
    for record in repeat.requests[first:last]:
        assert record.ttft_s is not None
        assert record.sent_s < moved_at
        assert record.ttft_s >= moved_at - record.due_s
    found = summarize([repeat], Limits())
    assert found.ttft_s is not None
    assert found.ttft_s.p99 >= 0.098


async def test_a_sender_that_is_late_tells() -> None:
    """Where this process itself could not send in time, requests count from when they were due all the same, and by how much
    they were late is reported."""

    async def block(request: LoadRequest) -> None:
        if request.index == 10:
            time.sleep(0.1)  # noqa: ASYNC251 - it is the event loop that shall stand still

    repeat = await run_load(FakeTarget(block), load_requests(100, every_s=0.001, output_tokens=1))

    began = repeat.requests[10].sent_s
    waited = [record for record in repeat.requests if began < record.due_s < began + 0.1]
    assert len(waited) >= 80
    for record in waited:
        assert record.sent_s >= began + 0.1
        assert record.ttft_s is not None
        assert record.ttft_s >= began + 0.1 - record.due_s
    found = summarize([repeat], Limits())
    assert found.send_delay_s is not None
    assert found.send_delay_s.max >= 0.08


# -- the closed loop ------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 30), concurrency=st.integers(1, 12))
def test_so_many_are_under_way_at_a_time(count: int, concurrency: int) -> None:
    """All that there are users for, and never more; each request is sent once, and is due when it is sent."""
    target = FakeTarget()

    repeat = run_now(target, load_requests(count), concurrency=concurrency)

    assert target.most_open == min(count, concurrency)
    assert [record.index for record in repeat.requests] == list(range(count))
    assert all(record.output_tokens == 3 and record.error is None for record in repeat.requests)
    assert all(0 <= record.sent_s - record.due_s < 1 for record in repeat.requests)


async def test_each_end_is_told_once() -> None:
    """``on_end`` hears of every request when it ends, of those that fail too."""

    async def fail(request: LoadRequest) -> None:
        if request.index == 1:
            raise ZeroDivisionError

    told: list[int] = []
    await put_on(FakeTarget(fail), load_requests(4), concurrency=1, on_end=lambda record: told.append(record.index))

    assert told == [0, 1, 2, 3]


# -- what goes wrong ------------------------------------------------------------------------------------------------------


async def test_errors_count_by_code_or_by_class() -> None:
    """What a target raises is its request's end and nobody else's trouble; chunks that came before are kept."""
    errors: dict[int, Exception] = {
        1: BackendError("x"),
        2: TargetError("http_503", "x"),
        3: OSError("x"),
        4: TargetError("http_503", "x"),
    }
    calls: list[int] = []

    async def fail(request: LoadRequest) -> None:
        calls.append(request.index)
        if request.index in errors and calls.count(request.index) == 2:
            raise errors[request.index]

    repeat = await run_load(FakeTarget(fail), load_requests(6, every_s=0.0))

    assert summarize([repeat], Limits()).errors == {"backend_error": 1, "http_503": 2, "OSError": 1}
    assert [record.output_tokens for record in repeat.requests] == [3, 1, 1, 1, 1, 3]


async def test_an_engine_that_is_full_refuses() -> None:
    """ResourceExhausted counts under its code, and those who were let in are served."""
    small = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with fake_engine(small, step_s=0.001) as (engine, _):
        repeat = await run_load(EngineTarget(engine), load_requests(5, every_s=0.0, output_tokens=50))

    found = summarize([repeat], Limits())
    assert (found.completed, found.errors) == (2, {"resource_exhausted": 3})


async def test_an_answer_that_its_deadline_cut_short_is_an_error() -> None:
    """Some tokens came in time, but not the answer."""
    request = LoadRequest(index=0, token_ids=load_requests(1)[0].token_ids, output_tokens=900, deadline_s=0.03)
    async with fake_engine(step_s=0.001) as (engine, _):
        repeat = await run_load(EngineTarget(engine), [request])

    [record] = repeat.requests
    assert record.error == "deadline_exceeded"
    assert record.output_tokens < 900


class StrangeTarget(FakeTarget):
    """Says how it is only every third time: else it raises, or never answers."""

    def __init__(self) -> None:
        super().__init__(lambda request: until(lambda: self.asked > 6))
        self.asked = 0

    async def state(self) -> tuple[RequestCounts, PageCounts] | None:
        self.asked += 1
        if self.asked % 3 == 1:
            raise ConnectionResetError
        if self.asked % 3 == 2:
            await anyio.sleep_forever()
        return COUNTS, PAGES


async def test_a_state_that_cannot_be_had_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """While ``state`` raises or hangs the requests go on, and when it is well again there are samples again."""
    monkeypatch.setattr(driver, "STATE_LIMIT_S", 0.005)
    monkeypatch.setattr(driver, "SAMPLE_EVERY_S", 0.001)

    repeat = await run_load(StrangeTarget(), load_requests(3), concurrency=3)

    assert [record.error for record in repeat.requests] == [None] * 3
    assert len(repeat.samples) == 2
    assert (repeat.samples[0].parked, repeat.samples[0].pages_free) == (1, 4)


# -- what is left behind --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_s", [0.0, None])
async def test_a_load_that_is_cancelled_leaves_no_stream_open(every_s: float | None) -> None:
    """In either loop, every request that was under way has been left when ``put_on`` has."""
    target = FakeTarget(lambda request: anyio.sleep_forever())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(put_on, target, load_requests(5, every_s=every_s), concurrency=5, on_end=ignore))
        await until(lambda: target.num_open == 5)
        tasks.cancel_scope.cancel()

    assert target.num_open == 0


async def test_a_load_that_is_cancelled_leaves_an_engine_empty() -> None:
    """Its pages are free, its requests count as cancelled, and it serves on."""
    async with fake_engine({"scheduler": {"max_running_requests": 8}}, step_s=0.001) as (engine, _):
        async with anyio.create_task_group() as tasks:
            load = load_requests(8, every_s=0.0, output_tokens=900)
            tasks.start_soon(partial(put_on, EngineTarget(engine), load, concurrency=1, on_end=ignore))
            await until(lambda: engine.status_now().requests.running == 8)
            tasks.cancel_scope.cancel()
        await until(lambda: engine.status_now().pages.active == 0)
        status = engine.status_now()
        assert (status.state, status.requests.cancelled, status.requests.running) == (EngineState.READY, 8, 0)
        assert (await engine.infer("x", max_tokens=3)).text


@asynccontextmanager
async def closing_badly() -> AsyncIterator[AsyncIterator[int]]:
    async def tokens() -> AsyncIterator[int]:
        yield 2

    yield tokens()
    raise ConnectionResetError


async def test_a_stream_that_fails_when_it_is_closed() -> None:
    """That is its request's error too."""
    target = FakeTarget()
    target.stream = lambda request: closing_badly()  # type: ignore[method-assign]

    [record] = (await run_load(target, load_requests(1))).requests

    assert (record.error, record.output_tokens) == ("ConnectionResetError", 2)


# -- traces ---------------------------------------------------------------------------------------------------------------


async def test_every_request_has_its_tree(recorder: SpanRecorder) -> None:
    """Of more requests than there are slots, under both loops, each has a span in its sender's trace, whose phases are
    without a gap and no longer than its sender has waited."""
    async with fake_engine({"scheduler": {"max_running_requests": 4}}, step_s=0.0005) as (engine, _):
        for load, concurrency in ((load_requests(20, every_s=0.001, output_tokens=5), 1), (load_requests(20), 6)):
            repeat = await run_load(EngineTarget(engine), load, concurrency=concurrency)
            spans = belonging(recorder.take(), {record.trace_id or "" for record in repeat.requests})

            assert num_untraced(repeat.requests, spans) == 0
            trees = {tree.root.trace_id: tree for tree in request_trees(spans)}
            assert set(trees) == {record.trace_id for record in repeat.requests}
            assert [fault for tree in trees.values() for fault in faults(tree)] == []
            for record in repeat.requests:
                root = trees[record.trace_id or ""].root
                assert 0 < (root.end_ns - root.start_ns) / 1e9 < record.end_s - record.sent_s + 0.001


async def test_without_an_sdk_there_is_no_trace() -> None:
    """Nobody records, and the record says so."""
    [record] = (await run_load(FakeTarget(), load_requests(1))).requests
    assert record.trace_id is None
