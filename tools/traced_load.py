"""Half a minute of load on the demo model, with every request traced and every metric read; then everything is compared:

    python -m tools.traced_load [--seconds 30] [--rate 4]

- each request that was sent came to its end, and has one tree of spans in its sender's trace;
- a tree is complete and well nested, and its phases add up to what the sender saw, within 2 % (and ``SLACK_S`` for it to
  be woken up: it shares the event loop with everybody else);
- the histograms have as many requests in them as there are trees, and the same seconds; the counters have the trees' tokens;
- spans of steps link to requests that there were, and every request of more than a second is in one of them.

Ends with 1 where any of it does not hold.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import anyio
import msgspec
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import TracerProvider

import ferrum_rt
from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.load.driver import put_on
from ferrum_rt.load.results import Repeat, SpanRecord
from ferrum_rt.load.spans import RequestTree, SpanRecorder, faults, request_trees
from ferrum_rt.load.targets import EngineTarget
from ferrum_rt.load.workload import Load
from ferrum_rt.runtime.simulation.workload import Sizes

TOLERANCE, SLACK_S = 0.02, 0.02
# ShareGPT's means.
PROMPT, OUTPUT = Sizes("lognormal", (202, 202)), Sizes("lognormal", (179, 179))

Measured = Mapping[str, Sequence[NumberDataPoint | HistogramDataPoint]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Load the demo model, and compare spans, metrics and what senders saw.")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    arguments = parser.parse_args()
    recorder, reader = SpanRecorder(), InMemoryMetricReader()
    spans, measured = TracerProvider(shutdown_on_exit=False), MeterProvider([reader], shutdown_on_exit=False)
    spans.add_span_processor(recorder)
    trace.set_tracer_provider(spans)
    metrics.set_meter_provider(measured)
    repeat, found = anyio.run(run, arguments.seconds, arguments.rate, recorder, reader, backend_options={"use_uvloop": True})
    wrong = list(disagreements(repeat, found))
    for line in wrong:
        print(line)
    tokens = sum(record.output_tokens for record in repeat.requests)
    print(
        f"{len(repeat.requests)} requests, {tokens} tokens in {repeat.duration_s:.1f} s, {len(repeat.spans)} spans: "
        f"{len(wrong)} disagreements"
    )
    return 1 if wrong else 0


async def run(seconds: float, rate: float, recorder: SpanRecorder, reader: InMemoryMetricReader) -> tuple[Repeat, Measured]:
    """Metrics are read while the engine is open, when its last request has ended."""
    async with ferrum_rt.open_runtime() as engine:
        info = engine.model_info
        load = Load(requests=round(seconds * rate), prompt=PROMPT, output=OUTPUT, rate=rate)
        requests = load.draw(
            1, vocabulary=[TokenId(number) for number in range(info.vocab_size)], max_model_len=info.max_model_len
        )
        repeat = await put_on(EngineTarget(engine), requests, concurrency=1, on_end=lambda _: None)
        found = read(reader)
    return msgspec.structs.replace(repeat, spans=recorder.take()), found


def read(reader: InMemoryMetricReader) -> Measured:
    data, found = reader.get_metrics_data(), defaultdict[str, list[NumberDataPoint | HistogramDataPoint]](list)
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] += metric.data.data_points  # type: ignore[arg-type]
    return found


def disagreements(repeat: Repeat, measured: Measured) -> Iterator[str]:
    """What does not fit together, a line each."""
    trees = request_trees(repeat.spans)
    yield from _of_requests(repeat, trees)
    yield from _of_metrics(trees, measured)
    yield from _of_steps(repeat.spans, trees)


def _of_requests(repeat: Repeat, trees: Sequence[RequestTree]) -> Iterator[str]:
    by_trace = defaultdict[str, list[RequestTree]](list)
    for tree in trees:
        by_trace[tree.root.trace_id].append(tree)
    if len(trees) != len(repeat.requests):
        yield f"{len(repeat.requests)} requests were sent, and {len(trees)} have spans"
    for record in repeat.requests:
        name = f"request {record.index}"
        if record.error is not None:
            yield f"{name} failed: {record.error}"
        if len(own := by_trace[record.trace_id or ""]) != 1:
            yield f"{name} has {len(own)} spans"
            continue
        [tree] = own
        for fault in faults(tree, TOLERANCE):
            yield f"{name}: {fault}"
        seen_s = record.end_s - record.sent_s
        told_s = sum(phase.end_ns - phase.start_ns for phase in tree.phases) / 1e9
        if abs(seen_s - told_s) > TOLERANCE * seen_s + SLACK_S:
            yield f"{name} took {seen_s:.4f} s, and its phases {told_s:.4f} s"
        if (told := tree.root.attributes.get(names.OUTPUT_TOKENS)) != record.output_tokens:
            yield f"{name} brought {record.output_tokens} tokens, and its span says {told}"


def _of_metrics(trees: Sequence[RequestTree], measured: Measured) -> Iterator[str]:
    roots = [tree.root for tree in trees]
    durations = [(root.end_ns - root.start_ns) / 1e9 for root in roots]
    firsts = [float(str(first)) for root in roots if (first := root.attributes.get(names.TIME_TO_FIRST_CHUNK)) is not None]
    for name, told in ((names.REQUEST_DURATION, durations), (names.TIME_TO_FIRST_TOKEN, firsts)):
        points = [point for point in measured.get(name, ()) if isinstance(point, HistogramDataPoint)]
        count, seconds = sum(point.count for point in points), sum(point.sum for point in points)
        if count != len(told) or abs(seconds - sum(told)) > 1e-3 * sum(told):
            yield f"{name}: {count} requests with {seconds:.4f} s, and spans tell of {len(told)} with {sum(told):.4f} s"
    for name, attribute in ((names.PROMPT_TOKENS, names.INPUT_TOKENS), (names.GENERATED_TOKENS, names.OUTPUT_TOKENS)):
        counted, told_tokens = _total(measured, name), sum(int(str(root.attributes[attribute])) for root in roots)
        if counted != told_tokens:
            yield f"{name}: {counted:g}, and spans tell of {told_tokens}"
    if (ended := _total(measured, names.REQUESTS_ENDED)) != len(roots):
        yield f"{names.REQUESTS_ENDED}: {ended:g}, and {len(roots)} have spans"
    if (left := _total(measured, names.REQUESTS)) != 0:
        yield f"{names.REQUESTS}: {left:g} after the last one has ended"


def _total(measured: Measured, name: str) -> float:
    return sum(point.value for point in measured.get(name, ()) if isinstance(point, NumberDataPoint))


def _of_steps(spans: Sequence[SpanRecord], trees: Sequence[RequestTree]) -> Iterator[str]:
    steps = [span for span in spans if span.name == names.STEP]
    known, linked = {tree.root.span_id for tree in trees}, {link for step in steps for link in step.links}
    if not steps:
        yield "no step has a span"
    if strangers := linked - known:
        yield f"steps link to {len(strangers)} spans that are no request's"
    # A step is recorded ten times a second: who was computed for a second was in one.
    for tree in trees:
        if tree.root.span_id not in linked and tree.root.end_ns - tree.root.start_ns > 1_000_000_000:
            yield f"request {tree.root.attributes.get(names.RESPONSE_ID)} was in no step that is recorded"


if __name__ == "__main__":
    sys.exit(main())
