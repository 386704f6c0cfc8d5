"""Watches every test: nothing that its engines were told or have answered may be in a log record, an error or a span.

It sees the engines of the test's own process. What it takes for a quotation are ``_LENGTH`` characters on end, at every
``_STRIDE`` of what was told. tests/faults/test_canary.py looks at more, and more closely, on ways that it goes itself.
"""

import logging
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, TypeVar

import pytest
from opentelemetry.sdk.trace import Span

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.types import ChatMessage, StreamChunk
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.output_text import OutputText

_LENGTH, _STRIDE = 16, 4
_MOST = (
    200_000  # characters of what was said are kept of a test; what some say to overwhelm an engine is none the better for
)
_MAY_HOLD_WORDS = {names.INPUT_MESSAGES, names.OUTPUT_MESSAGES}
_T = TypeVar("_T")


class Watch(logging.Handler):
    """A plugin of pytest's."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self._prompts: list[str] = []
        self._answers: dict[int, str] = {}
        self._told: list[str] = []
        self._num_said = 0

    def begin(self) -> None:
        logging.getLogger().addHandler(self)
        _follow(Generation, "__init__", lambda arguments, _: self._prompt(arguments[1].prompt))
        _follow(OutputText, "advance", lambda arguments, chunk: self._answer(id(arguments[0]), chunk))
        _follow(FerrumError, "__init__", lambda arguments, _: self._told.append(str(arguments[0])))
        _follow(Span, "end", lambda arguments, _: self._span(arguments[0]))

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(f"{record.getMessage()} {record.exc_info and record.exc_info[1]!r}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, _T, _T]:
        self._prompts, self._answers, self._told, self._num_said = [], {}, [], 0
        result = yield
        assert self.quotations() == []
        return result

    def quotations(self) -> list[str]:
        """What was told that has words of what was said."""
        said = "\0".join((*self._prompts, *self._answers.values()))
        return [
            text
            for text in self._told
            if any(text[at : at + _LENGTH] in said for at in range(0, len(text) - _LENGTH + 1, _STRIDE))
        ]

    def forget(self) -> None:
        """What was told so far."""
        self._told.clear()

    def _prompt(self, prompt: Any) -> None:
        texts = [prompt] if isinstance(prompt, str) else [one.content for one in prompt if isinstance(one, ChatMessage)]
        for text in texts:
            if self._num_said < _MOST:
                self._num_said += len(text)
                self._prompts.append(text[:_MOST])

    def _answer(self, output: int, chunk: StreamChunk) -> None:
        if self._num_said < _MOST:
            self._num_said += len(chunk.text)
            self._answers[output] = self._answers.get(output, "") + chunk.text

    def _span(self, span: Any) -> None:
        attributes = {name: value for name, value in span.attributes.items() if name not in _MAY_HOLD_WORDS}
        self._told.append(
            f"{span.name} {attributes} {[dict(event.attributes) for event in span.events]} {span.status.description}"
        )


def _follow(kind: type, name: str, note: Callable[[tuple[Any, ...], Any], None]) -> None:
    """Have ``note`` told of each call's arguments and result."""
    method = getattr(kind, name)

    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        result = method(*arguments, **named)
        note(arguments, result)
        return result

    setattr(kind, name, call)
