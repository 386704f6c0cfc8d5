"""The daemon's log: JSON objects, one a line, without anybody's words in them, and nobody waits for who reads it."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ferrum_rt.daemon import logs

CANARY = "the quick brown canary"
Lines = Callable[[], list[dict[str, Any]]]
SetUp = Callable[[str], Lines]
_log = logging.getLogger("ferrum_rt.somewhere")


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Put back what set_up changes in this process."""
    root, ours = logging.getLogger(), logging.getLogger("ferrum_rt")
    before = root.handlers, ours.level
    yield
    root.handlers, ours.level = before
    logging.captureWarnings(capture=False)
    logs.set_level("notset")


@pytest.fixture
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SetUp]:
    """logs.set_up with standard error in a file; returns a function that reads the file."""
    with open(tmp_path / "log", "w") as stream:

        def call(level: str) -> Lines:
            monkeypatch.setattr("sys.stderr", stream)  # not before, for pytest puts its own there as the test begins
            logs.set_up(level)
            return lambda: [json.loads(line) for line in (tmp_path / "log").read_bytes().splitlines()]

        yield call


def test_a_line_has_its_fields(set_up: SetUp) -> None:
    """Time, level, logger and event, and beside them what was given as extra."""
    lines = set_up("info")
    _log.info("connected", extra={"uid": 1000, "sockets": ["/run/s"]})
    [line] = lines()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "ferrum_rt.somewhere",
        "event": "connected",
        "uid": 1000,
        "sockets": ["/run/s"],
    }


def test_the_level_can_be_changed(set_up: SetUp) -> None:
    """What is below it is not written, from the change on."""
    lines = set_up("info")
    _log.debug("one")
    logs.set_level("debug")
    _log.debug("two")
    logs.set_level("error")
    _log.warning("three")
    assert [line["event"] for line in lines()] == ["two"]


def test_an_error_is_its_type_and_place(set_up: SetUp) -> None:
    """Its message is not written, for it may quote what a client sent; and of a deep one only the innermost places are."""

    def fail(depth: int) -> None:
        if depth:
            fail(depth - 1)
        raise ValueError(CANARY)

    lines = set_up("info")
    try:
        fail(500)
    except ValueError:
        _log.exception("it broke")
    [line] = lines()
    assert line["error"] == "ValueError"
    assert 0 < len(line["at"]) < 30
    assert line["at"][-1].endswith(" fail")
    assert CANARY not in json.dumps(line)


def test_other_packages_messages_are_not_written(set_up: SetUp) -> None:
    """Only where they were logged, and the type and place of an error that comes with them."""
    lines = set_up("debug")
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        logging.getLogger("asyncio").error(f"{CANARY} %s", CANARY, exc_info=error)
    logging.getLogger("ferrum_rt_but_not_ours").warning(CANARY)
    assert [line["event"] for line in lines()] == ["a message of another package"] * 2
    assert lines()[0]["error"] == "ValueError"
    assert CANARY not in json.dumps(lines())


def test_a_path_that_is_no_text_is_written(set_up: SetUp) -> None:
    """With its bytes escaped, and whatever is no JSON as Python shows it."""
    lines = set_up("info")
    _log.info("loading", extra={"sockets": ["/run/\udcff"], "file": Path("/x")})
    [line] = lines()
    assert line["sockets"] == ["/run/\udcff"]
    assert "/x" in line["file"]


def test_nobody_waits_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full pipe lines are lost, and those that were written are whole; with a closed one all are."""
    read_end, write_end = os.pipe()
    with open(write_end, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up("info")
        for number in range(2000):
            _log.info("connected", extra={"number": number, "what": "x" * 100})
        os.set_blocking(read_end, False)
        numbers = [json.loads(line)["number"] for line in os.read(read_end, 10_000_000).splitlines()]
        assert numbers == list(range(len(numbers)))
        assert 100 < len(numbers) < 2000
        _log.info("connected", extra={"number": 2000})
        assert json.loads(os.read(read_end, 4096))["number"] == 2000
        os.close(read_end)
        _log.info("connected")


def test_without_standard_error_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another file's."""
    monkeypatch.setattr("sys.stderr", None)
    logs.set_up("info")
    _log.error("connected")
