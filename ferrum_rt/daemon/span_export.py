"""Spans on their way out of a process that is ours, and a count of those that do not get there."""

import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ferrum_rt.interfaces.errors import ConfigError

MAX_WAITING = 2048
_MAX_BATCH = 512


class CountedSpans(SpanProcessor):
    """Hands spans to ``exporter`` in batches, from a thread of the SDK's: at the latest ``every_s`` seconds after they have
    ended, or as the SDK has it. While ``MAX_WAITING`` wait, those that come are dropped.

    The SDK drops too, and does not tell how many. So the bound is kept here, and the SDK's queue is never full."""

    def __init__(self, exporter: SpanExporter, *, every_s: float | None = None) -> None:
        self._sending = _Sending(exporter)
        self._batches = BatchSpanProcessor(
            self._sending,
            max_queue_size=MAX_WAITING,
            max_export_batch_size=_MAX_BATCH,
            schedule_delay_millis=None if every_s is None else 1e3 * every_s,
        )
        self._lock = threading.Lock()
        self._num_ended = self._num_refused = 0

    @property
    def num_dropped(self) -> int:
        """So far, from any thread: those for which there was no room, and those in batches whose export failed."""
        return self._num_refused + self._sending.num_failed

    @property
    def num_lost(self) -> int:
        """All that have not arrived, when nothing more will be sent."""
        return self._num_ended - self._sending.num_arrived

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return  # as the SDK has it
        with self._lock:
            self._num_ended += 1
            num_waiting = self._num_ended - self._num_refused - self._sending.num_taken
            if num_waiting > MAX_WAITING:
                self._num_refused += 1
                return
        self._batches.on_end(span)

    def shutdown(self) -> None:
        """Wait until all has been tried that waits."""
        self._batches.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """The same, and go on."""
        return self._batches.force_flush(timeout_millis)


class _Sending(SpanExporter):
    """An exporter, and what became of what it was given. One thread at a time exports."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.num_taken = self.num_arrived = self.num_failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.num_taken += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:  # what it raises the SDK logs
            if result is SpanExportResult.SUCCESS:
                self.num_arrived += len(spans)
            else:
                self.num_failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class LineExporter(SpanExporter):
    """A line of JSON for each span, as the SDK writes it."""

    def __init__(self, write: Callable[[bytes], None], close: Callable[[], None] = lambda: None) -> None:
        self._write, self._close = write, close

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._write("".join(f"{span.to_json(indent=None)}\n" for span in spans).encode())
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._close()


class SpanFile:
    """A file that lines are appended to. It is created for its owner alone; one that is there keeps its mode."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where there can be no such file."""
        try:
            self._file = open(path, "ab", buffering=0, opener=_for_its_owner)  # noqa: SIM115 - until close()
        except OSError as error:
            raise ConfigError(f"daemon.spans: {path}: cannot be written: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise ConfigError(f"daemon.spans: {path}: something other than a file is there; give another path")

    def write(self, lines: bytes) -> None:
        """All or nothing: half a line would spoil the next one too. Raises OSError."""
        size, left = os.fstat(self._file.fileno()).st_size, memoryview(lines)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        self._file.close()


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o600)  # without waiting, if it is a FIFO, for who reads it
