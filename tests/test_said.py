"""The watch over all tests sees what it looks for."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import FerrumError, ResourceExhausted
from ferrum_rt.interfaces.types import ChatMessage
from ferrum_rt.ipc.client import connect
from tests.conftest import Watch
from tests.fakes.daemon import forked_daemon
from tests.runtime.engines import fake_engine, text_after
from tests.said import Said

PROMPT = "what nobody else would ever say"
METER = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False).get_meter("test")
TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")


def observe(words: str) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("test")
    meter.create_observable_gauge("x", [lambda _: [Observation(1, {"a": words})]])
    reader.get_metrics_data()


LEAKS: dict[str, Callable[[str], object]] = {
    "error": lambda words: FerrumError(f"cannot take {words}"),
    "error of a class": lambda words: ResourceExhausted(words, 3.0),
    "log message": lambda words: logging.getLogger("ferrum_rt").warning("it was %s", words),
    "span name": lambda words: TRACER.start_span(words).end(),
    "span attribute": lambda words: TRACER.start_span("x", attributes={"a": words}).end(),
    "metric": lambda words: METER.create_counter("x").add(1, {"a": words}),
    "metric that is read": lambda words: observe(words),
}


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Watch:
    """That of this run."""
    found = request.config.pluginmanager.get_plugin("what was said")
    assert isinstance(found, Watch)
    return found


@pytest.fixture
def said(watch: Watch) -> Said:
    return watch.said


@pytest.mark.parametrize("leak", LEAKS)
async def test_words_are_found_wherever_they_are_told(said: Said, leak: str) -> None:
    """Of a prompt, of a chat message and of an answer, in part; and nothing else is taken for them."""
    async with fake_engine() as (engine, _):
        await engine.infer(PROMPT, max_tokens=40)
        await engine.infer([ChatMessage(role="user", content=PROMPT[::-1])], max_tokens=40)
    assert said.quotations() == []
    for words in (PROMPT, PROMPT[::-1], text_after(PROMPT, 40)):
        LEAKS[leak](words[3:28])
        LEAKS[leak]("words of our own, which may be told")
        assert len(said.quotations()) == 1
        said.forget_told()


def test_what_was_asked_for_may_be_there(said: Said) -> None:
    """The two attributes of a span that hold words hold them."""
    said.prompt(PROMPT)
    TRACER.start_span("x", attributes={names.INPUT_MESSAGES: PROMPT, names.OUTPUT_MESSAGES: PROMPT}).end()
    assert said.quotations() == []


async def test_a_daemon_reports_to_the_test_that_started_it(watch: Watch, tmp_path: Path) -> None:
    """A daemon that logs a prompt's words is found out, though it is killed."""
    path = tmp_path / "socket"
    async with forked_daemon(path, leaks=True), connect(path) as engine:
        await engine.infer("say nothing", max_tokens=1)
        assert watch.reported() == []
        await engine.infer(PROMPT, max_tokens=1)
        await engine.infer("and again", max_tokens=1)
    assert [PROMPT in line for line in watch.reported()] == [True]
