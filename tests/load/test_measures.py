"""Records to numbers."""

import math
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.types import DEFAULT_CLIENT
from ferrum_rt.load.measures import estimate, is_good, percentiles, summarize
from ferrum_rt.load.results import Chunk, Limits, Repeat, RequestRecord

TIMES = st.floats(0, 1e6, allow_nan=False)
RECORD = RequestRecord(
    index=0,
    client=DEFAULT_CLIENT,
    prompt_tokens=7,
    due_s=0.25,
    sent_s=0.5,
    end_s=2.0,
    chunks=[Chunk(1.0, 1), Chunk(1.5, 2), Chunk(1.75, 1)],
)
FAILED = msgspec.structs.replace(RECORD, error="resource_exhausted", chunks=[])


@settings(max_examples=40, deadline=None)
@given(st.lists(TIMES, min_size=1, max_size=400))
def test_percentiles_are_the_least_values_that_so_many_do_not_exceed(values: list[float]) -> None:
    """Counted by hand and by numpy, each is one of the values; mean and maximum are what they are."""
    found = percentiles(values)

    assert found is not None
    for percent in (50, 90, 95, 99):
        value = getattr(found, f"p{percent}")
        assert 100 * sum(other <= value for other in values) >= percent * len(values)
        assert 100 * sum(other < value for other in values) < percent * len(values)
        assert value == np.percentile(values, percent, method="inverted_cdf")
    assert found.max == max(values)
    assert found.mean == pytest.approx(float(np.mean(values)))


def test_there_are_no_percentiles_of_nothing() -> None:
    """Where no request has a first token, no time to it is made up."""
    assert percentiles([]) is None


@pytest.mark.parametrize("count", [2, 5, 16, 20])
def test_an_interval_covers_the_mean_19_times_in_20(count: int) -> None:
    """Of samples from a normal distribution, whose mean is known, 95 % of the intervals hold it, however few they are."""
    rng, trials, covered = Random(count), 2000, 0
    for _ in range(trials):
        found = estimate([rng.gauss(10, 3) for _ in range(count)])
        assert found.margin is not None
        covered += abs(found.mean - 10) <= found.margin
    assert covered / trials == pytest.approx(0.95, abs=0.018)  # four standard deviations of a share of 2,000


def test_one_repeat_has_no_interval() -> None:
    """What a single run is off by nobody knows."""
    assert msgspec.structs.astuple(estimate([3.0])) == (3.0, None)


def test_a_record_counts_from_when_it_was_due() -> None:
    """Time to the first token and to the end count from there, although it was sent later; a chunk's tokens share the time
    since the chunk before."""
    assert (RECORD.ttft_s, RECORD.e2e_s) == (0.75, 1.75)
    assert RECORD.itl_s == [0.25, 0.25, 0.25]
    assert RECORD.tpot_s == 0.25
    assert RECORD.output_tokens == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 5)), min_size=1, max_size=30))
def test_gaps_add_up_to_the_time_between_first_and_last_chunk(steps: list[tuple[float, int]]) -> None:
    """There is one for each token after the first chunk, and their mean is the time per token."""
    now, chunks = 0.0, []
    for gap, tokens in steps:
        now += gap
        chunks.append(Chunk(now, tokens))
    record = msgspec.structs.replace(RECORD, chunks=chunks, end_s=now)

    assert len(record.itl_s) == record.output_tokens - chunks[0].tokens
    assert sum(record.itl_s) == pytest.approx(now - chunks[0].at_s, abs=1e-9)
    if record.itl_s:
        assert record.tpot_s == pytest.approx(sum(record.itl_s) / len(record.itl_s))
    else:
        assert record.tpot_s is None


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (Limits(), True),
        (Limits(ttft_s=0.75, itl_s=0.25), True),
        (Limits(ttft_s=0.74), False),
        (Limits(itl_s=0.24), False),
    ],
)
def test_who_is_good(limits: Limits, good: bool) -> None:
    """It keeps each limit that there is; one that failed, or brought nothing, is not good under any."""
    assert is_good(RECORD, limits) is good
    assert not is_good(FAILED, limits)
    assert not is_good(msgspec.structs.replace(RECORD, chunks=[]), limits)


def test_a_summary_of_two_repeats() -> None:
    """Rates are means over the repeats, with their interval; percentiles are over all requests; a request that failed counts
    among the errors and nowhere else."""
    late = msgspec.structs.replace(RECORD, due_s=0.0, sent_s=0.5)
    repeats = [
        Repeat(began_ns=0, duration_s=2.0, requests=[RECORD, FAILED]),
        Repeat(began_ns=0, duration_s=1.0, requests=[late, late]),
    ]

    found = summarize(repeats, Limits(ttft_s=0.8), spans_dropped=3)

    assert (found.requests, found.completed, found.errors) == (4, 3, {"resource_exhausted": 1})
    assert (found.request_rate.mean, found.goodput.mean) == (1.25, 0.25)
    assert found.request_rate.margin == pytest.approx(12.706 * 1.5 / math.sqrt(2) / math.sqrt(2), rel=1e-3)
    assert found.output_token_rate.mean == (4 / 2 + 8) / 2
    assert found.total_token_rate.mean == (11 / 2 + 22) / 2
    assert found.ttft_s is not None
    assert (found.ttft_s.p50, found.ttft_s.max) == (1.0, 1.0)
    assert found.send_delay_s is not None
    assert (found.send_delay_s.p50, found.send_delay_s.max) == (0.25, 0.5)
    assert found.spans_dropped == 3
