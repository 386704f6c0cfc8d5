"""Results of load tests that nobody has run: every moment of them is known."""

from collections.abc import Iterator, Sequence

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.interfaces.types import ClientId
from ferrum_rt.load.measures import summarize
from ferrum_rt.load.results import (
    Chunk,
    Limits,
    LoadResult,
    Repeat,
    RequestRecord,
    Sample,
    SpanRecord,
    SweepPoint,
    SweepResult,
)

BEGAN_NS = 1_790_000_000_000_000_000
LIMITS = Limits(ttft_s=0.12, itl_s=0.05)
LOAD = {"requests": 12, "rate": 10.0, "prompt": "lognormal:202,180", "seed": 7, "ignore_eos": True, "trace": None}
MACHINE = {"cpu": "a processor", "cores": 2, "load_average": [0.25, 1.5]}
TARGET = "engine in this process, model demo"


def request(index: int, *, tokens: int = 8, error: str | None = None, client: str = "ada") -> RequestRecord:
    """Due every 0.1 s and sent 1 ms later; the first token comes after 70 ms, and then, every 30 ms, one and two in turn."""
    due_s = 0.1 * index
    chunks, at_s, left = list[Chunk](), due_s + 0.07, tokens
    while left:
        chunks.append(Chunk(at_s, min(left, 1 + len(chunks) % 2)))
        at_s, left = at_s + 0.03, left - chunks[-1].tokens
    end_s = (chunks[-1].at_s if chunks else due_s + 0.07) + 0.002
    return RequestRecord(
        index=index,
        client=ClientId(client),
        prompt_tokens=200,
        due_s=due_s,
        sent_s=due_s + 0.001,
        end_s=end_s,
        chunks=chunks,
        error=error,
        trace_id=f"{index + 1:032x}",
    )


def repeat(requests: Sequence[RequestRecord], *, has_spans: bool = True, has_samples: bool = True) -> Repeat:
    """What its requests make it last."""
    duration_s = max(one.end_s for one in requests)
    return Repeat(
        began_ns=BEGAN_NS,
        duration_s=duration_s,
        requests=requests,
        samples=list(samples(duration_s)) if has_samples else (),
        spans=[*(span for one in requests for span in request_spans(one)), *step_spans(duration_s)] if has_spans else (),
    )


def samples(duration_s: float) -> Iterator[Sample]:
    """Of 100 pages."""
    for number in range(int(duration_s / 0.1) + 1):
        active, cached = 10 + number % 20, number % 30
        yield Sample(
            at_s=0.1 * number,
            running=1 + number % 3,
            waiting=number % 2,
            parked=number % 4 // 3,
            pages_free=100 - active - cached,
            pages_active=active,
            pages_cached=cached,
        )


def span(name: str, begin_s: float, end_s: float, *, span_id: str, trace_id: str, **more: object) -> SpanRecord:
    moments = {"start_ns": BEGAN_NS + round(begin_s * 1e9), "end_ns": BEGAN_NS + round(end_s * 1e9)}
    facts = {"parent_id": None, "name": name, "span_id": span_id, "trace_id": trace_id, **moments, **more}
    return SpanRecord(**facts)  # type: ignore[arg-type]


def request_spans(record: RequestRecord) -> Iterator[SpanRecord]:
    """Queue, prefill in two chunks, decode; every fifth is parked in between, every seventh preempted."""
    assert record.trace_id is not None
    sent, root = record.sent_s, f"{record.index:04x}{0:012x}"
    attributes = {names.OPERATION_NAME: names.TEXT_COMPLETION, names.CLIENT: record.client}
    yield span(
        "text_completion demo",
        sent,
        record.end_s,
        span_id=root,
        trace_id=record.trace_id,
        attributes=attributes,
        is_error=record.error is not None,
    )
    begin = sent + 0.069
    middle = (begin + record.end_s) / 2
    phases = [(Phase.QUEUE, sent, sent + 0.02), (Phase.PREFILL, sent + 0.02, begin)]
    if record.index % 5 == 4:
        phases += [(Phase.DECODE, begin, middle), (Phase.PARKED, middle, record.end_s)]
    elif record.index % 7 == 6:
        phases += [(Phase.PREEMPTED, begin, middle), (Phase.DECODE, middle, record.end_s)]
    else:
        phases += [(Phase.DECODE, begin, record.end_s)]
    chunks = [("chunk", BEGAN_NS + round((sent + ago) * 1e9), {names.CHUNK_TOKENS: 100}) for ago in (0.021, 0.045)]
    for number, (phase, begin_s, end_s) in enumerate(phases, start=1):
        yield span(
            phase.value,
            begin_s,
            end_s,
            span_id=f"{record.index:04x}{number:012x}",
            trace_id=record.trace_id,
            parent_id=root,
            events=chunks if phase is Phase.PREFILL else (),
        )


def step_spans(duration_s: float) -> Iterator[SpanRecord]:
    """Every 0.1 s a step of 20 ms, with one prefill in every other."""
    for number in range(int(duration_s / 0.1) + 1):
        attributes = {
            names.STEP_DECODES: 3,
            names.STEP_PREFILLS: number % 2,
            names.STEP_PREFILL_TOKENS: 100 * (number % 2),
        }
        yield span(
            names.STEP,
            0.1 * number,
            0.1 * number + 0.02,
            span_id=f"5{number:015x}",
            trace_id=f"5{number:031x}",
            attributes=attributes,
        )


def load_result(*repeats: Repeat, limits: Limits = LIMITS, target: str = TARGET, spans_dropped: int = 0) -> LoadResult:
    """Of twelve requests, one of which fails, if no repeats are given."""
    repeats = repeats or (repeat([request(index, error="EngineFailed" if index == 8 else None) for index in range(12)]),)
    return LoadResult(
        target=target,
        load=LOAD,
        machine=MACHINE,
        limits=limits,
        summary=summarize(repeats, limits, spans_dropped),
        repeats=repeats,
    )


def sweep_result(*rates_met: tuple[float, bool], highest_rate: float | None) -> SweepResult:
    """Points in this order. What was not met took ten times as long."""
    points = []
    for rate, is_met in rates_met:
        slowness = 1 if is_met else 10
        requests = [request(index, tokens=8 * slowness) for index in range(12)]
        summary = summarize([repeat(requests, has_spans=False)], LIMITS)
        points.append(SweepPoint(rate=rate, is_met=is_met, good_share=1.0 if is_met else 0.5, summary=summary))
    return SweepResult(
        target=TARGET,
        load=LOAD,
        machine=MACHINE,
        limits=LIMITS,
        required_share=0.95,
        highest_rate=highest_rate,
        points=points,
    )


def edge_cases() -> dict[str, LoadResult | SweepResult]:
    """By what is special about them."""
    ordinary = [request(index) for index in range(6)]
    failed = [request(index, tokens=0, error="ResourceExhausted") for index in range(6)]
    unanswered = summarize([repeat(failed)], LIMITS)
    nothing_met = sweep_result((1.0, False), (0.5, False), highest_rate=None)
    dead = SweepPoint(rate=2.0, is_met=False, good_share=0.0, summary=unanswered)
    return {
        "ordinary": load_result(),
        "one request": load_result(repeat([request(0)])),
        "one token": load_result(repeat([request(0, tokens=1)])),
        "errors only": load_result(repeat(failed)),
        "no spans": load_result(repeat(ordinary, has_spans=False)),
        "no samples": load_result(repeat(ordinary, has_samples=False)),
        "neither": load_result(repeat(ordinary, has_spans=False, has_samples=False)),
        "three repeats": load_result(repeat(ordinary), repeat(ordinary[:4]), repeat(ordinary[:5])),
        "no limits": load_result(limits=Limits()),
        "spans lost": load_result(spans_dropped=17),
        "sweep": sweep_result((1.0, True), (2.0, True), (4.0, False), (3.0, True), (3.5, False), highest_rate=3.0),
        "sweep that met nothing": nothing_met,
        "sweep without an answer": SweepResult(
            target=TARGET, load={}, machine={}, limits=Limits(), required_share=0.9, highest_rate=None, points=[dead]
        ),
        "sweep of nothing": sweep_result(highest_rate=None),
    }
