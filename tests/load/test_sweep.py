"""The search for the highest rate."""

from functools import partial

import anyio
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.types import DEFAULT_CLIENT
from ferrum_rt.load.measures import summarize
from ferrum_rt.load.results import Chunk, Limits, Repeat, RequestRecord, Summary
from ferrum_rt.load.sweep import sweep


def summary_of(records: list[RequestRecord], limits: Limits) -> Summary:
    duration_s = max(record.end_s for record in records)
    return summarize([Repeat(began_ns=0, duration_s=duration_s, requests=records)], limits)


def record(index: int, due_s: float, begin_s: float, end_s: float, error: str | None = None) -> RequestRecord:
    chunks = [] if error else [Chunk(begin_s, 1), Chunk(end_s, 1)]
    return RequestRecord(
        index=index,
        client=DEFAULT_CLIENT,
        prompt_tokens=1,
        due_s=due_s,
        sent_s=due_s,
        end_s=end_s,
        chunks=chunks,
        error=error,
    )


class Queue:
    """One at a time, ``capacity`` a second, in virtual time: above it the backlog grows for as long as the load lasts."""

    duration_s, limit_s = 200.0, 0.5

    def __init__(self, capacity: float) -> None:
        self._service_s = 1 / capacity

    async def measure(self, rate: float) -> Summary:
        records, free_at = [], 0.0
        for index in range(max(1, round(rate * self.duration_s))):
            due_s = index / rate
            begin_s = max(due_s, free_at)
            free_at = begin_s + self._service_s
            records.append(record(index, due_s, begin_s, free_at))
        return summary_of(records, Limits(ttft_s=self.limit_s))


class Cliff:
    """Above its capacity it refuses what is more."""

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity

    async def measure(self, rate: float) -> Summary:
        share = min(1.0, self._capacity / rate)
        records = [record(number, 0.0, 0.1, 1.0, None if number < 100 * share else "full") for number in range(100)]
        return summary_of(records, Limits())


@settings(max_examples=50, deadline=None)
@given(capacity=st.floats(0.01, 1e4), begin=st.floats(0.1, 100))
@pytest.mark.slow
def test_a_known_capacity_is_found(capacity: float, begin: float) -> None:
    """Within 5 % below it, from wherever the search begins, and every rate at most that was met, every higher one not."""
    highest, points = anyio.run(partial(sweep, Cliff(capacity).measure, begin=begin, required_share=1.0, max_points=40))

    assert highest is not None
    assert capacity / 1.0101 / 1.05 <= highest <= capacity * 1.0101  # a hundredth is as fine as it can tell
    assert all(point.is_met == (point.rate <= highest) for point in points)


@settings(max_examples=12, deadline=None)
@given(capacity=st.floats(0.5, 8), begin=st.floats(0.5, 4))
@pytest.mark.slow
def test_the_capacity_of_a_queue_is_found(capacity: float, begin: float) -> None:
    """Of a simulated target whose first tokens come later and later above its capacity: within 5 %, besides what the limit
    and the tenth of the requests that may be late give away in a load of that length."""
    highest, points = anyio.run(partial(sweep, Queue(capacity).measure, begin=begin, required_share=0.9))

    assert highest is not None
    # Of the requests 0.9 may be behind by the limit at most: above the capacity by so much the load is too short to tell.
    given_away = 1 / (1 - Queue.limit_s / (0.9 * Queue.duration_s))
    assert capacity / 1.05 * 0.99 <= highest <= capacity * given_away * 1.01
    assert len(points) <= 12


async def test_where_no_rate_is_met() -> None:
    """There is no highest rate, and the search ends."""
    highest, points = await sweep(Cliff(0.0).measure, begin=4.0, required_share=0.9, max_points=6)

    assert highest is None
    assert [point.rate for point in points] == [4.0, 2.0, 1.0, 0.5, 0.25, 0.125]
    assert [point.good_share for point in points] == [0.0] * 6


async def test_rates_of_which_nothing_could_be_told_are_not_tried() -> None:
    """Nobody waits for the one request that comes in an hour: the search ends above ``least``, but has tried one rate."""
    _, points = await sweep(Cliff(0.0).measure, begin=4.0, required_share=0.9, least=0.9)
    assert [point.rate for point in points] == [4.0, 2.0, 1.0]
    _, points = await sweep(Cliff(0.0).measure, begin=0.5, required_share=0.9, least=0.9)
    assert [point.rate for point in points] == [0.5]


async def test_where_every_rate_is_met() -> None:
    """It ends too, with the highest that was tried."""
    highest, points = await sweep(Cliff(1e9).measure, begin=1.0, required_share=0.9, max_points=5)

    assert (highest, [point.rate for point in points]) == (16.0, [1.0, 2.0, 4.0, 8.0, 16.0])


@pytest.mark.parametrize(("required", "met"), [(0.5, True), (0.51, False)])
async def test_failed_requests_are_not_good(required: float, met: bool) -> None:
    """The share is of all requests, and one that was refused is none of the good."""
    _, [point] = await sweep(Cliff(5.0).measure, begin=10.0, required_share=required, max_points=1)

    assert (point.good_share, point.is_met) == (0.5, met)
    assert point.summary.errors == {"full": 50}


@settings(max_examples=50, deadline=None)
@given(good=st.integers(0, 60), total=st.integers(1, 60), failed=st.integers(0, 20), end_s=st.floats(0.5, 100))
def test_a_share_is_what_it_is(good: int, total: int, failed: int, end_s: float) -> None:
    """So many good ones of so many are enough where just that share is required, whatever the seconds that they took."""
    assume(good <= total)
    late = [record(number, 0.0, 0.1 if number < good else 0.4, end_s) for number in range(total)]
    lost = [record(total + number, 0.0, 0.0, end_s, "full") for number in range(failed)]

    async def measure(rate: float) -> Summary:
        return summary_of([*late, *lost], Limits(ttft_s=0.2))

    required = good / (total + failed)
    _, [point] = anyio.run(partial(sweep, measure, begin=1.0, required_share=round(required, 9), max_points=1))
    assert (point.is_met, point.good_share) == (True, round(required, 9))
