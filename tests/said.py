"""Watches engines: nothing that they were told or have answered may be in a log record, an error, a span or a metric.

``Said`` sees those of its own process. tests/conftest.py has one over all tests; a daemon of tests/fakes/daemon.py that is
started by a test has another, which writes what it finds to the file ``REPORTED_TO``. What they take for a quotation are
``_LENGTH`` characters on end, at every ``_STRIDE`` of what was told. tests/faults/test_canary.py looks more closely, on ways
that it goes itself.
"""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from opentelemetry.sdk.metrics._internal.metric_reader_storage import MetricReaderStorage  # the one way of all readers
from opentelemetry.sdk.trace import Span

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.types import ChatMessage, StreamChunk
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.text.output_text import OutputText

REPORTED_TO = "FERRUM_TESTS_SAID"
"""A variable of the environment."""

_LENGTH, _STRIDE = 16, 4
_MOST = (
    200_000  # characters of what was said are kept of a test; what some say to overwhelm an engine is none the better for
)
_MAY_HOLD_WORDS = {names.INPUT_MESSAGES, names.OUTPUT_MESSAGES}
_AT_ONCE = 1000


class Said:
    """What was said by prompts and answers, and what was told of it."""

    def __init__(self) -> None:
        self.forget()

    def begin(self) -> None:
        follow(Generation, "__init__", lambda arguments, _: self._prompt(arguments[1].prompt))
        follow(OutputText, "advance", lambda arguments, chunk: self._answer(id(arguments[0]), chunk))
        follow(logging.Logger, "callHandlers", lambda arguments, _: self._record(arguments[1]))
        follow(FerrumError, "__init__", lambda arguments, _: self.tell(str(arguments[0])))
        follow(Span, "end", lambda arguments, _: self._span(arguments[0]))
        follow(MetricReaderStorage, "consume_measurement", lambda arguments, _: self._measurement(arguments[1]))

    def tell(self, text: str) -> None:
        self._told[text] = None

    def quotations(self) -> list[str]:
        """What was told that has words of what was said."""
        if not self._told:
            return []
        said = "\0".join((*self._prompts, *self._answers.values()))
        return [
            text
            for text in self._told
            if any(text[at : at + _LENGTH] in said for at in range(0, len(text) - _LENGTH + 1, _STRIDE))
        ]

    def forget(self) -> None:
        """All so far."""
        self._prompts: list[str] = []
        self._answers: dict[int, str] = {}
        self._num_said = 0
        self.forget_told()

    def forget_told(self) -> None:
        self._told: dict[str, None] = {}

    def prompt(self, text: str) -> None:
        if self._num_said < _MOST:
            self._num_said += len(text)
            self._prompts.append(text[:_MOST])

    def _prompt(self, prompt: Any) -> None:
        for text in [prompt] if isinstance(prompt, str) else [one.content for one in prompt if isinstance(one, ChatMessage)]:
            self.prompt(text)

    def _answer(self, output: int, chunk: StreamChunk) -> None:
        if self._num_said < _MOST:
            self._num_said += len(chunk.text)
            self._answers[output] = self._answers.get(output, "") + chunk.text

    def _record(self, record: logging.LogRecord) -> None:
        self.tell(f"{record.getMessage()} {record.exc_info and record.exc_info[1]!r}")

    def _span(self, span: Any) -> None:
        attributes = {name: value for name, value in span.attributes.items() if name not in _MAY_HOLD_WORDS}
        self.tell(f"{span.name} {attributes} {[dict(event.attributes) for event in span.events]} {span.status.description}")

    def _measurement(self, measurement: Any) -> None:
        self.tell(f"{measurement.instrument.name} {dict(measurement.attributes or {})}")


class Reported(Said):
    """Of a process that may be killed at any time: it is looked at when a request ends, or much was told."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def begin(self) -> None:
        super().begin()
        follow(Generation, "close", lambda *_: self._report())

    def tell(self, text: str) -> None:
        super().tell(text)
        if len(self._told) >= _AT_ONCE:
            self._report()

    def _report(self) -> None:
        found = self.quotations()
        self.forget_told()
        if found:
            with self._path.open("a") as file:
                file.writelines(f"{text!r}\n" for text in found)


def follow(kind: type, name: str, note: Callable[[tuple[Any, ...], Any], None]) -> None:
    """Have ``note`` told of each call's arguments and result."""
    method = getattr(kind, name)

    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        result = method(*arguments, **named)
        note(arguments, result)
        return result

    setattr(kind, name, call)
