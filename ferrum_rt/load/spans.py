"""The spans of a load test: gathered in this process or read from a file, and put together to the requests they tell of."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.load.results import Repeat, RequestRecord, SpanRecord

_PHASES = frozenset(Phase)


class SpanRecorder(SpanProcessor):
    """Keeps every span that ends."""

    def __init__(self) -> None:
        self._ended: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._ended.append(span)

    def take(self) -> list[SpanRecord]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return [_record(span) for span in ended]


def read_spans(path: Path) -> list[SpanRecord]:
    """From a file that a daemon has written, with a span in JSON a line; its last line may not be complete yet. Raises
    ConfigError naming the line."""
    found = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_from_json(msgspec.json.decode(line, type=dict[str, Any])))
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path}: line {number}: no span: {error}") from error
    return found


def _record(span: ReadableSpan) -> SpanRecord:
    context = span.context
    assert context is not None  # it was made by a tracer
    assert span.start_time is not None
    assert span.end_time is not None  # it has ended
    return SpanRecord(
        name=span.name,
        trace_id=format_trace_id(context.trace_id),
        span_id=format_span_id(context.span_id),
        parent_id=None if span.parent is None else format_span_id(span.parent.span_id),
        start_ns=span.start_time,
        end_ns=span.end_time,
        attributes=dict(span.attributes or {}),
        events=[(event.name, event.timestamp, dict(event.attributes or {})) for event in span.events],
        links=[format_span_id(link.context.span_id) for link in span.links],
        is_error=span.status.status_code is StatusCode.ERROR,
    )


def _from_json(span: Mapping[str, Any]) -> SpanRecord:
    """From what the SDK's ``to_json`` makes of one."""

    def nanoseconds(moment: str) -> int:
        return round(datetime.fromisoformat(moment).timestamp() * 1e6) * 1000

    return SpanRecord(
        name=span["name"],
        trace_id=span["context"]["trace_id"].removeprefix("0x"),
        span_id=span["context"]["span_id"].removeprefix("0x"),
        parent_id=None if span["parent_id"] is None else span["parent_id"].removeprefix("0x"),
        start_ns=nanoseconds(span["start_time"]),
        end_ns=nanoseconds(span["end_time"]),
        attributes=span["attributes"] or {},
        events=[(event["name"], nanoseconds(event["timestamp"]), event["attributes"] or {}) for event in span["events"]],
        links=[link["context"]["span_id"].removeprefix("0x") for link in span["links"]],
        is_error=span["status"]["status_code"] == "ERROR",
    )


# -- what they tell of ----------------------------------------------------------------------------------------------------


class RequestTree(msgspec.Struct, frozen=True):
    """A request's span, and those of its phases in their order."""

    root: SpanRecord
    phases: Sequence[SpanRecord]


def request_trees(spans: Iterable[SpanRecord]) -> list[RequestTree]:
    """In the order in which the requests came."""
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    roots = []
    for span in spans:
        if names.OPERATION_NAME in span.attributes:
            roots.append(span)
        elif span.name in _PHASES and span.parent_id is not None:
            children[span.parent_id].append(span)
    return [
        RequestTree(root, sorted(children[root.span_id], key=lambda span: (span.start_ns, span.end_ns)))
        for root in sorted(roots, key=lambda span: span.start_ns)
    ]


def belonging(spans: Iterable[SpanRecord], trace_ids: Set[str]) -> list[SpanRecord]:
    """Those of these traces, and those of steps that link to them."""
    spans = list(spans)
    own = {span.span_id for span in spans if span.trace_id in trace_ids}
    return [span for span in spans if span.span_id in own or not own.isdisjoint(span.links)]


def with_spans(repeat: Repeat, spans: Iterable[SpanRecord]) -> Repeat:
    """With those of its requests' traces, and of the steps that link to them, beside what it has."""
    trace_ids = {request.trace_id for request in repeat.requests if request.trace_id is not None}
    return msgspec.structs.replace(repeat, spans=[*repeat.spans, *belonging(spans, trace_ids)])


def num_untraced(requests: Iterable[RequestRecord], spans: Iterable[SpanRecord]) -> int:
    """Completed requests whose span is not among these, or has no phases."""
    traced = {tree.root.trace_id for tree in request_trees(spans) if tree.phases}
    return sum(request.error is None and request.trace_id not in traced for request in requests)


def faults(tree: RequestTree, tolerance: float = 0.02) -> Iterator[str]:
    """What is wrong with a tree: phases follow each other from begin to end of the request, within so large a share of
    its time, the first of them is its queue, and each lies inside the request."""
    root, phases = tree.root, tree.phases
    total_ns = root.end_ns - root.start_ns
    allowed_ns = tolerance * total_ns
    if not phases or phases[0].name != Phase.QUEUE:
        yield "it does not begin in the queue"
        return
    if (lost := abs(sum(phase.end_ns - phase.start_ns for phase in phases) - total_ns)) > allowed_ns:
        yield f"its phases miss its {total_ns / 1e6:.3f} ms by {lost / 1e6:.3f} ms"
    before = root.start_ns
    for phase in phases:
        if abs(phase.start_ns - before) > allowed_ns:
            yield f"{phase.name} begins {(phase.start_ns - before) / 1e6:.3f} ms after what is before it has ended"
        if phase.end_ns < phase.start_ns or phase.start_ns < root.start_ns or phase.end_ns > root.end_ns:
            yield f"{phase.name} is not inside its request"
        if phase.trace_id != root.trace_id:
            yield f"{phase.name} is of another trace"
        before = phase.end_ns
    if before != root.end_ns and abs(before - root.end_ns) > allowed_ns:
        yield "it goes on after its last phase"
