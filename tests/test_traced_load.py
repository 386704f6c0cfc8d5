"""tools.traced_load: a short run of it, and that it would notice what it is there for."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.types import ClientId
from ferrum_rt.load.results import Chunk, Repeat, RequestRecord, SpanRecord
from tests.fakes.daemon import ROOT
from tools.traced_load import disagreements, read

SECOND = 1_000_000_000


@pytest.mark.slow
def test_a_short_run_agrees_with_itself() -> None:
    """Three seconds of load in a process of its own: every span, every metric and every record tell the same."""
    command = [sys.executable, "-m", "tools.traced_load", "--seconds", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("12 requests, ")
    assert done.stdout.endswith(": 0 disagreements\n")


def told(number: int) -> list[SpanRecord]:
    """The spans of a request of two seconds, the first of which it spent in the queue and with its prompt."""
    trace_id, begin = f"{number:032x}", number * SECOND

    def span(name: str, key: int, start_s: float, end_s: float, **more: Any) -> SpanRecord:
        moments = (begin + int(moment * SECOND) for moment in (start_s, end_s))
        start_ns, end_ns = moments
        return SpanRecord(name=name, trace_id=trace_id, span_id=f"{number}/{key}", start_ns=start_ns, end_ns=end_ns, **more)

    attributes = {
        names.OPERATION_NAME: names.TEXT_COMPLETION,
        names.RESPONSE_ID: f"r{number}",
        names.INPUT_TOKENS: 7,
        names.OUTPUT_TOKENS: 3,
        names.TIME_TO_FIRST_CHUNK: 1.0,
    }
    return [
        span("text_completion demo", 0, 0, 2, parent_id="client", attributes=attributes),
        span("queue", 1, 0, 0.5, parent_id=f"{number}/0"),
        span("prefill", 2, 0.5, 1, parent_id=f"{number}/0"),
        span("decode", 3, 1, 2, parent_id=f"{number}/0"),
        span(names.STEP, 4, 1, 1.1, parent_id=None, links=[f"{number}/0"]),
    ]


def seen(number: int) -> RequestRecord:
    """The same request, as its sender saw it."""
    return RequestRecord(
        index=number,
        client=ClientId("default"),
        prompt_tokens=7,
        due_s=number,
        sent_s=number,
        end_s=number + 2.001,
        chunks=[Chunk(number + 1.0, 1), Chunk(number + 2.0, 2)],
        trace_id=f"{number:032x}",
    )


def counted(requests: int, *, prompt: int = 7, output: int = 3, left: int = 0) -> InMemoryMetricReader:
    """What an engine counts of so many of them."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("test")
    for name, seconds in ((names.REQUEST_DURATION, 2.0), (names.TIME_TO_FIRST_TOKEN, 1.0)):
        histogram = meter.create_histogram(name)
        for _ in range(requests):
            histogram.record(seconds)
    for name, count in (
        (names.PROMPT_TOKENS, requests * prompt),
        (names.GENERATED_TOKENS, requests * output),
        (names.REQUESTS_ENDED, requests),
        (names.REQUESTS, left),
    ):

        def observe(_: CallbackOptions, count: int = count) -> Sequence[Observation]:
            return [Observation(count)]

        meter.create_observable_up_down_counter(name, [observe])
    return reader


def whole(spans: Sequence[SpanRecord]) -> Repeat:
    return Repeat(began_ns=0, duration_s=4.0, requests=[seen(1), seen(2)], spans=spans)


GOOD = [*told(1), *told(2)]


def test_what_fits_together_is_left_alone() -> None:
    """Two requests, their spans and what was counted of them agree."""
    assert list(disagreements(whole(GOOD), read(counted(2)))) == []


def changed(at: int, **fields: Any) -> list[SpanRecord]:
    """The good spans, with one of them different."""
    return [msgspec.structs.replace(span, **fields) if number == at else span for number, span in enumerate(GOOD)]


@pytest.mark.parametrize(
    ("spans", "what"),
    [
        (GOOD[:5], "2 requests were sent, and 1 have spans"),
        ([*GOOD, *told(3)], "2 requests were sent, and 3 have spans"),
        ([span for span in GOOD if span.name != "queue"], "does not begin in the queue"),
        ([span for span in GOOD if span.name != "prefill"], "its phases miss"),
        (changed(3, start_ns=SECOND), "its phases miss"),
        (changed(3, end_ns=4 * SECOND), "not inside its request"),
        (changed(3, trace_id="other"), "of another trace"),
        (changed(0, attributes={**GOOD[0].attributes, names.OUTPUT_TOKENS: 2}), "its span says 2"),
        (changed(4, links=["stranger"]), "1 spans that are no request's"),
        (changed(4, links=[]), "r1 was in no step"),
        ([span for span in GOOD if span.name != names.STEP], "no step has a span"),
    ],
)
def test_spans_that_are_wrong_are_found(spans: list[SpanRecord], what: str) -> None:
    """One that is missing, one too many, a gap, a wrong parent, a wrong count."""
    assert any(what in line for line in disagreements(whole(spans), read(counted(2))))


@pytest.mark.parametrize(
    ("reader", "what"),
    [
        (lambda: counted(1), names.REQUEST_DURATION),
        (lambda: counted(3), names.TIME_TO_FIRST_TOKEN),
        (lambda: counted(2, prompt=8), names.PROMPT_TOKENS),
        (lambda: counted(2, output=4), names.GENERATED_TOKENS),
        (lambda: counted(2, left=1), f"{names.REQUESTS}: 1"),
        (lambda: counted(3), names.REQUESTS_ENDED),
    ],
)
def test_metrics_that_are_wrong_are_found(reader: Callable[[], InMemoryMetricReader], what: str) -> None:
    """Requests, seconds and tokens that spans do not tell of."""
    assert any(line.startswith(what) for line in disagreements(whole(GOOD), read(reader())))


def test_what_a_sender_saw_is_held_against_the_spans() -> None:
    """A request that failed, or took its sender longer than its phases."""
    late = msgspec.structs.replace(seen(1), end_s=3.2)
    failed = msgspec.structs.replace(seen(2), error="cancelled")
    lines = list(disagreements(msgspec.structs.replace(whole(GOOD), requests=[late, failed]), read(counted(2))))
    assert lines == ["request 1 took 2.2000 s, and its phases 2.0000 s", "request 2 failed: cancelled"]
