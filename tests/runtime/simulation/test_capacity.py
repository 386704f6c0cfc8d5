"""Workloads, and what a simulated engine makes of them: where the answer is known in closed form, exactly that."""

import json
import math
import statistics
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.types import Arrival, ClientId, PageCounts, Priority, SchedulerStats
from ferrum_rt.runtime.simulation.capacity import simulate_capacity
from ferrum_rt.runtime.simulation.engine import StepCosts
from ferrum_rt.runtime.simulation.reports import MAX_POINTS, CapacityReport, Objectives, Percentiles, Timeline, curve
from ferrum_rt.runtime.simulation.workload import Arrivals, ClientShare, Sizes, Workload, read_trace

SECOND_STEPS = StepCosts(base_s=1.0, token_s=0.0, sequence_s=0.0, context_s=0.0)


def run(
    arrivals: list[Arrival], *, costs: StepCosts = SECOND_STEPS, shared_prefix: int = 0, **config: Any
) -> CapacityReport:
    objectives = Objectives(ttft_s=2.0, itl_s=1.5)
    return simulate_capacity(
        arrivals, build_config(None, None, config), costs, objectives, shared_prefix=shared_prefix
    ).report


def requests(moments: list[float], prompt: int = 8, output: int = 1, **fields: Any) -> list[Arrival]:
    return [Arrival(arrival_s=at, prompt_tokens=prompt, output_tokens=output, **fields) for at in moments]


ONE_SLOT = {"max_running_requests": 1}

# -- closed forms ---------------------------------------------------------------------------------------------------------


def test_waiting_follows_lindley() -> None:
    """With one slot and one step of a second a request, the mean time to a first token is that of Lindley's recursion: each
    waits for what the one before waited and took, less the time between them."""
    moments = list(islice(Arrivals(rate=0.8).times(Random(3)), 200))
    wait, expected = 0.0, [1.0]
    for before, after in pairwise(moments):
        wait = max(0.0, wait + 1.0 - (after - before))
        expected.append(wait + 1.0)

    ttft = run(requests(moments), scheduler=ONE_SLOT).total.ttft_s

    assert ttft.mean == pytest.approx(statistics.fmean(expected), rel=1e-9)
    assert ttft.p99 == pytest.approx(sorted(expected)[197], rel=1e-9)


@pytest.mark.slow
def test_the_mean_wait_of_an_m_d_1_queue() -> None:
    """Poisson arrivals at half of what one slot can do wait half a step on average (Pollaczek and Khinchine)."""
    moments = list(islice(Arrivals(rate=0.5).times(Random(1)), 20_000))

    ttft = run(requests(moments), scheduler=ONE_SLOT).total.ttft_s

    assert ttft.mean - 1.0 == pytest.approx(0.5 / (2 * (1 - 0.5)), rel=0.05)


def test_a_request_alone() -> None:
    """It computes its prompt in chunks, then a token a step: what comes when is known."""
    report = run(requests([3.0], prompt=20, output=5), batching={"max_batched_tokens": 8}, scheduler=ONE_SLOT)

    assert report.steps == 3 + 4
    assert (report.total.ttft_s.mean, report.total.itl_s.mean) == (3.0, 1.0)
    assert report.seconds == 3.0 + 7.0
    assert report.busy == pytest.approx(0.7)
    assert report.output_tokens_per_s == pytest.approx(0.5)
    assert report.pages.most == 2  # of 16 tokens, for 24: the last token is never written


# -- what becomes of requests ---------------------------------------------------------------------------------------------


def test_a_full_queue_refuses() -> None:
    """One runs and two wait; of ten at once the other seven are refused, and attain nothing."""
    report = run(requests([0.0] * 10), scheduler={**ONE_SLOT, "max_waiting_requests": 2})

    assert (report.finished, report.refused, report.late) == (3, 7, 0)
    assert report.total.attainment == 0.2  # within two seconds come two


def test_what_is_too_long_is_refused() -> None:
    """A request past max_model_len is refused, and the others are not."""
    arrivals = requests([0.0, 1.0], prompt=30) + requests([2.0], prompt=8)

    assert run(arrivals, max_model_len=16).refused == 2


def test_deadlines_cut_short() -> None:
    """A request whose deadline passes before its end is late."""
    report = run(requests([0.0, 0.0], output=4, deadline_s=5.0), scheduler=ONE_SLOT)

    assert (report.finished, report.late) == (1, 1)


def test_few_pages_preempt() -> None:
    """Where pages run out, sequences are preempted, and end all the same."""
    report = run(
        requests([0.0] * 4, prompt=10, output=30),
        scheduler={"max_running_requests": 4},
        kv_cache={"num_pages": 6, "block_size": 8},
    )

    assert report.finished == 4
    assert report.preemptions > 0
    assert report.pages.most == 6


def test_pages_that_hold_no_request() -> None:
    """Too few pages for max_model_len are a ConfigError that names the field."""
    with pytest.raises(ConfigError, match=r"kv_cache\.num_pages"):
        run(requests([0.0]), kv_cache={"num_pages": 1}, max_model_len=100)


def test_a_shared_prefix_is_computed_once() -> None:
    """Of a client's prompts the shared pages come from the cache; another client's do not."""
    arrivals = requests([0.0, 9.0], prompt=64) + requests([20.0], prompt=64, client=ClientId("other"))

    assert run(arrivals).cached_tokens == 0
    assert run(arrivals, shared_prefix=32).cached_tokens == 32


def test_clients_and_priorities() -> None:
    """The urgent client's request goes first, and each client has its own row."""
    arrivals = [
        *requests([0.0] * 5, client=ClientId("many")),
        *requests([0.5], client=ClientId("urgent"), priority=Priority.HIGH),
    ]

    report = run(arrivals, scheduler=ONE_SLOT)

    many, urgent = report.clients
    assert (many.client, many.requests, urgent.client, urgent.requests) == ("many", 5, "urgent", 1)
    assert urgent.ttft_s.mean == 1.5  # the rest of the step that runs, and its own
    assert many.ttft_s.mean == statistics.fmean([1, 3, 4, 5, 6])
    assert (many.share, urgent.share) == (5 / 6, 1 / 6)
    assert (many.attainment, urgent.attainment) == (0.2, 1.0)


def test_clients_are_held_to_their_policies() -> None:
    """Weights, limits and priorities of the configuration hold in the simulation as they do in an engine."""
    both = [ClientId("a"), ClientId("b")]
    arrivals = [arrival for client in both for arrival in requests([0.0] * 40, output=4, client=client)]
    plain = run(arrivals, scheduler=ONE_SLOT)
    assert plain.clients[0].ttft_s.p50 == pytest.approx(plain.clients[1].ttft_s.p50, rel=0.1)

    weighted = run(arrivals, scheduler={**ONE_SLOT, "clients": {"a": {"weight": 8.0}}})
    assert weighted.clients[0].ttft_s.p50 < weighted.clients[1].ttft_s.p50 / 2

    urgent = requests([0.5], client=ClientId("urgent"), priority=Priority.HIGH)
    held = run([*arrivals, *urgent], scheduler={**ONE_SLOT, "clients": {"urgent": {"max_priority": "low"}}})
    assert held.clients[2].ttft_s.mean > 100 > run([*arrivals, *urgent], scheduler=ONE_SLOT).clients[2].ttft_s.mean

    few = run(arrivals, scheduler={**ONE_SLOT, "clients": {"a": {"max_requests": 3}, "b": {"max_queued_tokens": 16}}})
    assert [client.finished for client in few.clients] == [3, 2]
    assert few.refused == 75


# -- workloads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [("512", 512, 0), ("uniform:100,300", 200, 58), ("normal:500,50", 500, 50), ("lognormal:400,300", 400, 300)],
)
def test_sizes(text: str, mean: float, deviation: float) -> None:
    """A distribution has the mean and the standard deviation that it says."""
    rng, sizes = Random(1), Sizes.parse(text)
    drawn = [sizes.draw(rng) for _ in range(5000)]

    assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)
    assert statistics.pstdev(drawn) == pytest.approx(deviation, rel=0.1)


def test_sizes_are_at_least_one() -> None:
    """However wide the distribution is, no request is empty."""
    rng, sizes = Random(1), Sizes.parse("normal:2,10")

    assert min(sizes.draw(rng) for _ in range(100)) == 1


@pytest.mark.parametrize(
    "text",
    ["", "many", "0", "-3", "nan", "inf", "normal:5", "poisson:5", "uniform:9,3", "512,3", "normal:5,-1", "uniform:,"],
)
def test_what_is_no_distribution(text: str) -> None:
    """It is a ConfigError that repeats what was written."""
    with pytest.raises(ConfigError, match="'"):
        Sizes.parse(text)


@pytest.mark.parametrize(("kind", "variation"), [("constant", 0.0), ("poisson", 1.0), ("bursty", 3.0)])
def test_arrivals(kind: Any, variation: float) -> None:
    """They come at the rate that is asked for, with the variation of distances that the process has."""
    moments = list(islice(Arrivals(kind=kind, rate=4.0).times(Random(2)), 8000))
    gaps = [after - before for before, after in pairwise(moments)]

    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert statistics.pstdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.1)


def test_seasons() -> None:
    """In the first half of a period more come than in the second, by as much as the amplitude says."""
    arrivals = Arrivals(kind="seasonal", rate=10.0, period_s=100.0, amplitude=0.5)
    moments = list(islice(arrivals.times(Random(1)), 10_000))
    share = sum(moment % 100 < 50 for moment in moments) / len(moments)

    assert moments[-1] == pytest.approx(1000, rel=0.05)
    assert share == pytest.approx(0.5 + 0.5 / math.pi, abs=0.02)


@pytest.mark.parametrize("field", ["rate", "burstiness", "period_s", "amplitude"])
def test_arrivals_that_cannot_be(field: str) -> None:
    """A number out of range is a ConfigError that names it."""
    with pytest.raises(ConfigError, match=f"{field} must be"):
        msgspec.structs.replace(Arrivals(), **{field: -1.0})


def test_shares_of_clients() -> None:
    """Clients send as their shares say, with their priorities, and a longer draw begins with the shorter one."""
    workload = Workload(clients=[ClientShare.parse("a=3"), ClientShare.parse("b=1:high")])

    drawn = workload.draw(2000, seed=1)

    assert sum(arrival.client == "a" for arrival in drawn) / 2000 == pytest.approx(0.75, abs=0.03)
    assert {arrival.priority for arrival in drawn if arrival.client == "b"} == {Priority.HIGH}
    assert drawn[:50] == workload.draw(50, seed=1)
    assert drawn != workload.draw(2000, seed=2)


@pytest.mark.parametrize("text", ["a", "=1", "a=", "a=0", "a=x", "a=1:urgent", "a=nan", "a=inf"])
def test_what_is_no_client(text: str) -> None:
    """It is a ConfigError that says how one is written."""
    with pytest.raises(ConfigError, match="NAME=SHARE"):
        ClientShare.parse(text)


def test_a_trace(tmp_path: Path) -> None:
    """Lines in any order of time, with priorities by name or number, and blank lines between."""
    path = tmp_path / "trace.jsonl"
    lines = [
        {"arrival_s": 2.5, "prompt_tokens": 7, "output_tokens": 3, "client": "a", "priority": "high", "deadline_s": 4},
        {"arrival_s": 1, "prompt_tokens": 5, "output_tokens": 2, "priority": 0},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")

    early, late = read_trace(path)

    assert early == Arrival(arrival_s=1.0, prompt_tokens=5, output_tokens=2, priority=Priority.LOW)
    assert late == Arrival(
        arrival_s=2.5, prompt_tokens=7, output_tokens=3, client=ClientId("a"), priority=Priority.HIGH, deadline_s=4.0
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        ("{", "line 1"),
        ('{"arrival_s": 0, "prompt_tokens": 1}', "line 1.*output_tokens"),
        ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "line 1: prompt_tokens must be at least 1, got 0"),
        ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "line 1: arrival_s must be at least 0"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "prio": 1}', "line 1.*prio"),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "priority": "max"}', "line 1.*priority"),
    ],
)
def test_a_bad_trace(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file, the line and what is wrong in it."""
    path = tmp_path / "trace.jsonl"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


# -- figures --------------------------------------------------------------------------------------------------------------


def test_percentiles() -> None:
    """Of 1 to 100 they are what they are called; of nothing they are NaN."""
    found = Percentiles.of(float(value) for value in range(100, 0, -1))

    assert (found.mean, found.p50, found.p90, found.p99) == (50.5, 50, 90, 99)
    assert curve(float(value) for value in range(1, 101)) == [1, *range(1, 101)]
    assert math.isnan(Percentiles.of([]).p99)
    assert curve([]) == []


def test_a_timeline_stays_short() -> None:
    """Of very many moments at most MAX_POINTS are kept, evenly, and the levels are of all."""
    timeline = Timeline()
    pages = PageCounts(total=10, free=10, active=0, cached=0)
    for number in range(1, 10 * MAX_POINTS + 1):
        stats = SchedulerStats(
            running=1,
            waiting=number % 2,
            parked=0,
            preemptions=0,
            prompt_tokens=0,
            cached_tokens=0,
            generated_tokens=0,
            pages=pages,
        )
        timeline.add(float(number), stats)

    assert MAX_POINTS / 2 < len(timeline.moments) <= MAX_POINTS
    assert len(timeline.columns["waiting"]) == len(timeline.moments)
    gaps = {after - before for before, after in pairwise(timeline.moments)}
    assert len(gaps) == 1
    assert timeline.level("waiting").mean == pytest.approx(0.5, abs=1e-3)
    assert timeline.level("waiting").most == 1
