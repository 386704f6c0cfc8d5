"""Spans read from a daemon's file, and brought to their requests."""

from pathlib import Path

import msgspec
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, Status, StatusCode

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.load.results import SpanRecord
from ferrum_rt.load.spans import SpanRecorder, belonging, faults, read_spans, request_trees

TRACE, OTHER = "a" * 32, "b" * 32


def span(name: str, start: int, end: int, *, own: str = "1", parent: str | None = None, **fields: object) -> SpanRecord:
    plain = SpanRecord(name=name, trace_id=TRACE, span_id=own, parent_id=parent, start_ns=start, end_ns=end)
    return msgspec.structs.replace(plain, **fields)


ROOT = span("chat demo", 0, 1000, own="1", attributes={names.OPERATION_NAME: "chat"})
PHASES = [
    span("queue", 0, 100, own="2", parent="1"),
    span("prefill", 100, 300, own="3", parent="1"),
    span("decode", 300, 1000, own="4", parent="1"),
]


def test_a_file_says_what_was_recorded(tmp_path: Path) -> None:
    """Written as the SDK writes JSON, to the microsecond, with attributes, events, links and the error."""
    recorder, exporter, provider = SpanRecorder(), InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(recorder)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("outer") as outer:
        inner = tracer.start_span("inner", links=[Link(outer.get_span_context())], start_time=1_700_000_000_123_457_000)
        inner.set_attribute("number", 3)
        inner.add_event("event", {"size": 4}, 1_700_000_000_123_458_000)
        inner.set_status(Status(StatusCode.ERROR))
        inner.end(1_700_000_000_999_999_000)
    path = tmp_path / "spans.jsonl"
    path.write_text("".join(f"{item.to_json(indent=None)}\n" for item in exporter.get_finished_spans()))

    read, recorded = read_spans(path), recorder.take()

    assert [item.name for item in read] == ["inner", "outer"]
    assert read[0] == recorded[0]
    assert (read[1].span_id, read[1].trace_id, read[1].parent_id) == (recorded[1].span_id, recorded[1].trace_id, None)
    assert abs(read[1].end_ns - recorded[1].end_ns) < 1000
    assert recorder.take() == []


def test_a_last_line_may_still_be_written(tmp_path: Path) -> None:
    """What the daemon is in the middle of is not there yet; nonsense elsewhere is an error that names its line."""
    path = tmp_path / "spans.jsonl"
    path.write_text('{"name": "half a')
    assert read_spans(path) == []

    path.write_text('{"name": "no span"}\n')
    with pytest.raises(ConfigError, match="line 1: no span"):
        read_spans(path)
    with pytest.raises(ConfigError, match="nowhere: cannot be read"):
        read_spans(tmp_path / "nowhere")


def test_spans_belong_to_the_requests_of_a_load() -> None:
    """Those of its traces, and steps that link to them; not those of other users of the same daemon."""
    others = span("chat demo", 0, 9, own="5", trace_id=OTHER)
    step, other_step = (
        span("engine step", 0, 9, own=own, trace_id=own * 8, links=[link]) for own, link in (("6", "1"), ("7", "5"))
    )

    assert belonging([ROOT, others, step, other_step, *PHASES], {TRACE}) == [ROOT, step, *PHASES]


def test_a_whole_tree_has_no_faults() -> None:
    """Its phases come in their order, whatever the order in which they were written."""
    [tree] = request_trees([*reversed(PHASES), ROOT])
    assert [phase.name for phase in tree.phases] == ["queue", "prefill", "decode"]
    assert list(faults(tree)) == []


@pytest.mark.parametrize(
    ("phases", "fault"),
    [
        ([], "does not begin in the queue"),
        (PHASES[1:], "does not begin in the queue"),
        ([PHASES[0], PHASES[2]], "decode begins"),
        (PHASES[:2], "goes on after its last phase"),
        ([*PHASES[:2], span("decode", 300, 1100, own="4", parent="1")], "is not inside"),
        ([*PHASES[:2], span("decode", 300, 1000, own="4", parent="1", trace_id=OTHER)], "of another trace"),
        ([PHASES[0], span("prefill", 50, 300, own="3", parent="1"), PHASES[2]], "prefill begins"),
    ],
)
def test_what_is_wrong_with_a_tree_is_told(phases: list[SpanRecord], fault: str) -> None:
    """A missing phase, a gap, an overlap, one that is too long or in another trace."""
    [tree] = request_trees([ROOT, *phases])
    assert any(fault in told for told in faults(tree))
