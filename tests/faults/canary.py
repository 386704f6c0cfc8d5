"""Texts that nobody else writes, and everything that a process tells of itself, to be searched for them.

The process is a host's, with OpenTelemetry's SDK set up for all of it, as hosts do that: so this runs in one of its own.
"""

import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, Status, StatusCode

from ferrum_rt.interfaces import telemetry as names
from tests.runtime.engines import text_after

_MARK = re.compile(r"Q\d{3}zx")
_MARK_AS_IDS = re.compile(r"81, (\d\d), (\d\d), (\d\d), 122, 120")
_GRAM = 12
_NUM_SAMPLES, _NUM_TOKENS = 3, 64
_TRACER = trace.get_tracer("a host")


class Canaries:
    """Each bears a mark, again and again: any eleven characters of it have the mark in them, and name the place where it was
    said. Of what a model answers any twelve characters are looked for."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}
        self._grams: set[str] = set()

    def text(self, place: str) -> str:
        mark = f"Q{len(self._places):03}zx"
        self._places[mark] = place
        return mark * 4

    def prompt(self, place: str) -> str:
        """For the fake model, whose answer is looked for as well."""
        text = self.text(place)
        self.answered_after(text)
        return text

    def answered_after(self, prompt: str) -> None:
        for sample in range(_NUM_SAMPLES):
            self.answered(text_after(prompt, _NUM_TOKENS, sample=sample))

    def answered(self, text: str) -> None:
        self._grams |= {text[at : at + _GRAM] for at in range(len(text) - _GRAM + 1)}

    def found_in(self, text: str) -> set[str]:
        """The places of those that are in a text, as they are or as the fake's token ids."""
        marks = set(_MARK.findall(text))
        marks |= {f"Q{''.join(chr(int(code)) for code in codes)}zx" for codes in _MARK_AS_IDS.findall(text)}
        places = {self._places.get(mark, mark) for mark in marks}
        if any(text[at : at + _GRAM] in self._grams for at in range(len(text) - _GRAM + 1)):
            places.add("an answer")
        return places


class Told:
    """Everything that comes out of the process from now on: spans, metrics, log records of all loggers at all levels,
    warnings, and errors, as pairs of a kind and a text."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, str]] = []
        self._spans, self._metrics = InMemorySpanExporter(), InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        trace.set_tracer_provider(provider)
        metrics.set_meter_provider(MeterProvider([self._metrics]))
        logging.getLogger().addHandler(_Keep(self))
        for name in ("", "ferrum_rt", "asyncio", "opentelemetry"):
            logging.getLogger(name).setLevel(logging.DEBUG)
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: self.note("warning", str(message))
        sys.unraisablehook = lambda found: self.note_error("unraisable", found.exc_value)
        threading.excepthook = lambda found: self.note_error("thread", found.exc_value)

    def note(self, kind: str, text: str) -> None:
        self._texts.append((kind, text))

    def note_error(self, kind: str, error: BaseException | None) -> None:
        for text in () if error is None else described(error):
            self.note(kind, text)

    def on_loop_fault(self, loop: object, context: dict[str, Any]) -> None:
        """The event loop's exception handler."""
        self.note("loop", str(context.get("message")))
        self.note_error("loop", context.get("exception"))

    def take_spans(self) -> list[ReadableSpan]:
        """Those that ended since the last call."""
        spans = list(self._spans.get_finished_spans())
        self._spans.clear()
        return spans

    def take(self, spans: list[ReadableSpan]) -> list[tuple[str, str]]:
        """What was told since the last call, and these spans. Metrics count from the start, and are told anew each time."""
        texts, self._texts = self._texts, []
        found = self._metrics.get_metrics_data()
        if found is not None:
            texts.append(("metrics", found.to_json()))
        return [*texts, *(("span", span.to_json()) for span in spans)]

    async def fails(self, call: Awaitable[object], kind: type[Exception]) -> None:
        """It must, with an error of this kind, which the host's own span records, as hosts' spans do."""
        try:
            with _TRACER.start_as_current_span("the host"):
                await call
        except Exception as error:
            self.note_error("exception", error)
            if not isinstance(error, kind):
                raise
        else:
            raise AssertionError(f"no {kind.__name__} came of it")


class _Keep(logging.Handler):
    def __init__(self, told: Told) -> None:
        super().__init__(logging.NOTSET)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.note("log", f"{record.getMessage()} {vars(record)!r}")
        if record.exc_info:
            self._told.note_error("log", record.exc_info[1])


def described(error: BaseException) -> Iterator[str]:
    """All that is in an error, in those that caused it, and in those that it holds."""
    yield "".join(traceback.format_exception(error))
    known: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in known:
            continue
        known.add(id(one))
        yield f"{one} {one!r} {one.args!r} {vars(one)!r} {getattr(one, '__notes__', [])!r}"
        left.append(one.__cause__)
        if not one.__suppress_context__:
            left.append(one.__context__)
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions


def without_captured(spans: Sequence[ReadableSpan]) -> tuple[list[ReadableSpan], str]:
    """The spans without the attributes that may hold words, and those."""
    left, words = [], ""
    for span in spans:
        attributes = dict(span.attributes or {})
        words += "".join(str(attributes.pop(name, "")) for name in (names.INPUT_MESSAGES, names.OUTPUT_MESSAGES))
        bare = ReadableSpan(
            name=span.name,
            context=span.context,
            parent=span.parent,
            attributes=attributes,
            events=span.events,
            links=span.links,
            status=span.status,
            start_time=span.start_time,
            end_time=span.end_time,
        )
        left.append(bare)
    return left, words


async def planted(said: Canaries, told: Told) -> None:
    """What must never be: a canary in each place where the search looks."""
    tracer, meter, log = trace.get_tracer("planted"), metrics.get_meter("planted"), logging.getLogger("planted")
    link = Link(SpanContext(1, 2, is_remote=False), {"words": said.text("span link")})
    with tracer.start_as_current_span(said.text("span name"), links=[link]) as span:
        span.set_attribute("words", said.text("span attribute"))
        span.add_event(said.text("span event"), {"words": said.text("event attribute")})
        span.set_status(Status(StatusCode.ERROR, said.text("span status")))
    meter.create_counter("planted").add(1, {"words": said.text("metric attribute")})
    log.debug(said.text("log message"))
    log.debug("%s", said.text("log argument"))
    log.debug("x", extra={"words": said.text("log extra")})
    warnings.warn(said.text("warning"), stacklevel=1)
    try:
        try:
            raise ValueError("x", {"words": said.text("argument of a cause")})
        except ValueError as cause:
            error = LookupError(said.text("error")[:13])
            error.add_note(said.text("note"))
            error.words = list(said.text("attribute, as token ids").encode())  # type: ignore[attr-defined]
            raise error from cause
    except LookupError as error:
        log.exception("x")
        told.note_error("exception", error)
    log.debug(text_after(said.prompt("prompt"), 40)[7:20])
