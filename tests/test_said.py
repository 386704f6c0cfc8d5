"""The watch over all tests sees what it looks for."""

import logging
from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace import TracerProvider

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import FerrumError, ResourceExhausted
from ferrum_rt.interfaces.types import ChatMessage
from tests.runtime.engines import fake_engine, text_after
from tests.said import Watch

PROMPT = "what nobody else would ever say"
TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")
LEAKS: dict[str, Callable[[str], object]] = {
    "error": lambda words: FerrumError(f"cannot take {words}"),
    "error of a class": lambda words: ResourceExhausted(words, 3.0),
    "log message": lambda words: logging.getLogger("ferrum_rt").warning("it was %s", words),
    "span name": lambda words: TRACER.start_span(words).end(),
    "span attribute": lambda words: TRACER.start_span("x", attributes={"a": words}).end(),
}


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Watch:
    """That of this run."""
    found = request.config.pluginmanager.get_plugin("what was said")
    assert isinstance(found, Watch)
    return found


@pytest.mark.parametrize("leak", LEAKS)
async def test_words_are_found_wherever_they_are_told(watch: Watch, leak: str) -> None:
    """Of a prompt, of a chat message and of an answer, in part; and nothing else is taken for them."""
    async with fake_engine() as (engine, _):
        await engine.infer(PROMPT, max_tokens=40)
        await engine.infer([ChatMessage(role="user", content=PROMPT[::-1])], max_tokens=40)
    assert watch.quotations() == []
    for words in (PROMPT, PROMPT[::-1], text_after(PROMPT, 40)):
        LEAKS[leak](words[3:28])
        LEAKS[leak]("words of our own, which may be told")
        assert len(watch.quotations()) == 1
        watch.forget()


def test_what_was_asked_for_may_be_there(watch: Watch) -> None:
    """The two attributes of a span that hold words hold them."""
    watch._prompt(PROMPT)
    TRACER.start_span("x", attributes={names.INPUT_MESSAGES: PROMPT, names.OUTPUT_MESSAGES: PROMPT}).end()
    assert watch.quotations() == []
