"""Where the daemon's spans and metrics go: to a collector, to a file, to standard error; and what of them is lost."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from ferrum_rt.daemon.config import DaemonConfig
from ferrum_rt.daemon.logs import StandardError
from ferrum_rt.daemon.span_export import MAX_WAITING, CountedSpans, LineExporter, SpanFile
from ferrum_rt.daemon.telemetry import exported
from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.ipc.client import connect
from ferrum_rt.load.spans import faults, read_spans, request_trees
from tests.command_line import FERRUM_RT, Cli, assert_one_error
from tests.daemon.otlp import collector
from tests.daemon.test_prometheus import scrape
from tests.fakes.daemon import ForkedDaemon, forked_daemon, started

PARENT = trace.NonRecordingSpan(
    trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
)
PHASES = ["queue", "prefill", "decode"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ferrum-rt" / "default.sock"


async def ask(path: Path, *, max_tokens: int = 3) -> None:
    async with connect(path) as client:
        with trace.use_span(PARENT):
            await client.infer("x", max_tokens=max_tokens)


async def stop(daemon: ForkedDaemon) -> None:
    daemon.send(signal.SIGTERM)
    assert await daemon.end() == 0


# -- to a collector -------------------------------------------------------------------------------------------------------


async def test_a_request_arrives_with_its_phases(path: Path) -> None:
    """With an endpoint configured the span of a client's request is there, in the client's trace, when the daemon has ended
    at the latest; its phases are its children, and follow each other without a gap from its begin to its end."""
    with collector() as found:
        async with forked_daemon(path, daemon={"otlp": found.endpoint}) as daemon:
            await ask(path)
            await stop(daemon)
            assert daemon.logged("spans were dropped") == []
    requests = [span for span in found.spans if span.name == "text_completion fake"]
    assert [(span.trace_id, span.parent_span_id) for span in requests] == [
        ((0xABC).to_bytes(16, "big"), (0xDEF).to_bytes(8, "big"))
    ]
    [request] = requests
    phases = sorted(
        (span for span in found.spans if span.parent_span_id == request.span_id), key=lambda span: span.start_time_unix_nano
    )
    assert [span.name for span in phases] == PHASES
    assert {span.trace_id for span in phases} == {request.trace_id}
    moments = [request.start_time_unix_nano, *(span.end_time_unix_nano for span in phases)]
    assert [span.start_time_unix_nano for span in phases] == moments[:-1]
    assert moments[-1] == request.end_time_unix_nano
    assert any(span.name == names.STEP for span in found.spans)


async def test_metrics_arrive(path: Path) -> None:
    """The last of them when the daemon has ended: what the engine had counted, with its outcomes, the histograms with the
    conventions' buckets, and that no span was dropped."""
    with collector() as found:
        async with forked_daemon(path, daemon={"otlp": f"{found.endpoint}/"}) as daemon:
            await ask(path)
            await ask(path)
            await stop(daemon)
    for name, bounds in (
        (names.REQUEST_DURATION, names.DURATION_BOUNDS),
        (names.TIME_TO_FIRST_TOKEN, names.FIRST_TOKEN_BOUNDS),
        (names.TIME_PER_OUTPUT_TOKEN, names.PER_TOKEN_BOUNDS),
    ):
        [point] = found.metrics[name].histogram.data_points
        assert point.count == 2, name
        assert tuple(point.explicit_bounds) == bounds, name
    assert values(found.metrics[names.GENERATED_TOKENS]) == {"": 6}
    assert values(found.metrics[names.REQUESTS_ENDED], names.OUTCOME)["finished"] == 2
    assert values(found.metrics[names.REQUESTS], names.STATE) == {"running": 0, "waiting": 0, "parked": 0}
    assert values(found.metrics[names.SPANS_DROPPED], names.EXPORTER) == {"otlp": 0}


def values(metric: Metric, by: str | None = None) -> dict[str, float]:
    """Of a sum: the points, by one of their attributes."""
    found = {}
    for point in metric.sum.data_points:
        attributes = {pair.key: pair.value.string_value for pair in point.attributes}
        found[attributes[by] if by else ""] = point.as_int or point.as_double
    return found


async def test_what_a_collector_refuses_is_told_once(path: Path) -> None:
    """The log says at the end how many spans were lost, and nothing else is different."""
    with collector(status=400) as found:
        async with forked_daemon(path, daemon={"otlp": found.endpoint}) as daemon:
            await ask(path)
            await stop(daemon)
            [line] = daemon.logged("spans were dropped")
    assert line["dropped"] == {"otlp": len(found.spans)}
    assert len(found.spans) >= 1 + len(PHASES)


# -- to a file, or to standard error --------------------------------------------------------------------------------------


async def test_spans_go_to_a_file(path: Path, tmp_path: Path) -> None:
    """A line each, behind those of the daemon before, for nobody else to read; ``read_spans`` makes whole trees of them."""
    file = tmp_path / "spans.jsonl"
    for num_requests in (1, 2):
        async with forked_daemon(path, daemon={"spans": str(file)}) as daemon:
            await ask(path)
            await stop(daemon)
        trees = request_trees(read_spans(file))
        assert len(trees) == num_requests
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for tree in trees:
        assert [phase.name for phase in tree.phases] == PHASES
        assert list(faults(tree)) == []
        assert tree.root.attributes[names.OUTPUT_TOKENS] == 3


async def test_spans_go_to_standard_error(path: Path, tmp_path: Path) -> None:
    """A line each, among those of the log."""
    async with forked_daemon(path, daemon={"spans": "-"}) as daemon:
        await ask(path)
        await stop(daemon)
        lines = daemon.log()
    spans = [line for line in lines if "context" in line]
    assert [line["event"] for line in lines if line not in spans] == ["loading", "ready", "draining", "stopped"]
    (tmp_path / "spans").write_text("".join(f"{json.dumps(span)}\n" for span in spans))
    [tree] = request_trees(read_spans(tmp_path / "spans"))
    assert [phase.name for phase in tree.phases] == PHASES


async def test_a_reader_that_reads_nothing_stops_nobody(path: Path, tmp_path: Path) -> None:
    """With spans and log in a pipe that is full, requests are answered, and the daemon ends with status 0."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "1"}
        async with forked_daemon(
            path, environment=environment, stderr=str(tmp_path / "pipe"), daemon={"spans": "-", "log_level": "debug"}
        ) as daemon:
            os.set_blocking(reader, False)
            for _ in range(60):
                await ask(path)
            os.close(reader)  # the end would wait for it, up to its limit
            reader = -1
            await stop(daemon)
    finally:
        if reader >= 0:
            os.close(reader)


# -- from the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_the_command_sends_them_everywhere(path: Path, tmp_path: Path) -> None:
    """With the demo model: a request's spans are in the file and at the collector, and its metrics at the socket."""
    place, metrics = tmp_path / "spans.jsonl", tmp_path / "metrics" / "s"
    with collector() as found:
        options = ["--otlp", found.endpoint, "--spans", str(place), "--prometheus", str(metrics)]
        command = [*FERRUM_RT, "serve", "--socket", str(path), "--device", "cpu", *options]
        async with started(command, stderr=subprocess.DEVNULL) as process:
            await ask(path, max_tokens=8)
            scraped = await scrape(str(metrics))
            process.send_signal(signal.SIGINT)
            assert await anyio.to_thread.run_sync(process.wait) == 0
    [tree] = request_trees(read_spans(place))
    assert [phase.name for phase in tree.phases] == PHASES
    assert list(faults(tree)) == []
    assert tree.root.trace_id == f"{0xABC:032x}"
    assert tree.root.span_id in {span.span_id.hex() for span in found.spans}
    assert found.metrics[names.REQUEST_DURATION].histogram.data_points[0].count == 1
    assert scraped["gen_ai_server_request_duration_seconds_count"][0].value == 1


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is loaded."""
    result = Cli(capsys)("serve", "--prometheus", "0.0.0.0:9464")
    assert_one_error(result)
    assert "daemon.prometheus is a loopback address" in result.err


# -- pieces ---------------------------------------------------------------------------------------------------------------


class Kept(SpanExporter):
    """Keeps the spans; ``answer`` may raise, or wait."""

    def __init__(self, answer: Callable[[], SpanExportResult] = lambda: SpanExportResult.SUCCESS) -> None:
        self.spans: list[ReadableSpan] = []
        self._answer = answer

    def export(self, spans: Any) -> SpanExportResult:
        self.spans += spans
        return self._answer()


@pytest.fixture
def make() -> Iterator[Callable[[SpanExporter, int], CountedSpans]]:
    """So many spans for an exporter, from a provider of the test's own."""
    providers = []

    def call(exporter: SpanExporter, count: int) -> CountedSpans:
        provider, counted = TracerProvider(shutdown_on_exit=False), CountedSpans(exporter, every_s=0.001)
        providers.append(provider)
        provider.add_span_processor(counted)
        tracer = provider.get_tracer("test")
        for number in range(count):
            tracer.start_span(f"{number}").end()
        return counted

    yield call
    for provider in providers:
        provider.shutdown()


Make = Callable[[SpanExporter, int], CountedSpans]


def test_what_arrives_is_not_dropped(make: Make) -> None:
    """In its order."""
    exporter = Kept()
    counted = make(exporter, 700)
    counted.shutdown()
    assert [span.name for span in exporter.spans] == [f"{number}" for number in range(700)]
    assert (counted.num_dropped, counted.num_lost) == (0, 0)


def failing() -> SpanExportResult:
    return SpanExportResult.FAILURE


def raising() -> SpanExportResult:
    raise ZeroDivisionError


@pytest.mark.parametrize("answer", [failing, raising])
def test_what_an_exporter_refuses_is_counted(answer: Callable[[], SpanExportResult], make: Make) -> None:
    """Whether it says so or raises."""
    exporter = Kept(answer)
    counted = make(exporter, 700)
    counted.force_flush()
    assert (counted.num_dropped, counted.num_lost) == (700, 700)


def test_what_there_is_no_room_for_is_counted(make: Make) -> None:
    """While an exporter hangs ``MAX_WAITING`` wait behind what it has; the rest is dropped at once. Once it goes on, nothing
    that waited is."""
    is_reached, may_go_on = Event(), Event()

    def hanging() -> SpanExportResult:
        is_reached.set()
        may_go_on.wait(30)
        return SpanExportResult.SUCCESS

    exporter = Kept(hanging)
    counted = make(exporter, 1)
    assert is_reached.wait(30)
    tracer = TracerProvider(shutdown_on_exit=False)
    tracer.add_span_processor(counted)
    for _ in range(MAX_WAITING + 700):
        tracer.get_tracer("test").start_span("x").end()
    assert counted.num_dropped == 700
    assert counted.num_lost == MAX_WAITING + 701
    may_go_on.set()
    counted.shutdown()
    assert len(exporter.spans) == MAX_WAITING + 1
    assert (counted.num_dropped, counted.num_lost) == (700, 700)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, make: Make) -> None:
    """A batch that does not fit is lost whole and counted, and what comes when there is room again can be read."""
    path = tmp_path / "spans.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = SpanFile(path)
    first = make(LineExporter(file.write), 3)
    first.force_flush()
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        second = make(LineExporter(file.write), 5)
        second.force_flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (first.num_dropped, second.num_dropped) == (0, 5)
    assert path.stat().st_size == size
    third = make(LineExporter(file.write, file.close), 2)
    third.shutdown()
    assert Counter(span.name for span in read_spans(path)) == Counter("01201")


def test_lines_of_two_threads_are_whole() -> None:
    """However long they are, however slowly they are read; and who may not wait does not."""
    read_end, write_end = os.pipe()
    stream = StandardError(write_end)
    long = [b"%d" % (number % 10) * 20_000 + b"\n" for number in range(30)]
    writer = Thread(target=stream.write, args=(b"".join(long),))
    writer.start()
    received = bytearray()
    while received.count(b"\n") - received.count(b"short") < len(long):
        stream.write_nowait(b"short\n")
        received += os.read(read_end, 3000)
    writer.join(30)
    os.close(write_end)
    while more := os.read(read_end, 100_000):
        received += more
    os.close(read_end)
    lines = bytes(received).splitlines(keepends=True)
    assert [line for line in lines if line != b"short\n"] == long
    assert b"short\n" in lines


# -- what is wrong is said at the start -----------------------------------------------------------------------------------

WRONG: Mapping[str, tuple[DaemonConfig, str]] = {
    "opentelemetry.exporter.otlp.proto.http.trace_exporter": (DaemonConfig(otlp="http://localhost:4318"), "otlp"),
    "opentelemetry.exporter.prometheus": (DaemonConfig(prometheus="127.0.0.1:0"), "prometheus"),
}


@pytest.mark.parametrize("module", WRONG)
def test_a_missing_package_is_said_at_the_start(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who configures an exporter without its package is told what to install."""
    config, extra = WRONG[module]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"^daemon\.{extra}: .*pip install 'ferrum-rt\[{extra}\]'$"):
        with exported(config, None):
            pass


@pytest.mark.parametrize("kind", ["a directory", "a FIFO", "in no directory", "no standard error"])
def test_a_place_for_spans_that_cannot_be_is_said_at_the_start(kind: str, tmp_path: Path) -> None:
    """Without waiting for a FIFO's reader."""
    path = tmp_path / "spans"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "in no directory":
        path = path / "spans"
    with pytest.raises(ConfigError, match=r"^daemon\.spans: "):
        with exported(DaemonConfig(spans="-" if kind == "no standard error" else str(path)), None):
            pass
