"""No prompt and no answer is in anything that the engine tells of itself: spans, metrics, log records, warnings, errors.
Unless it is asked to put them into spans."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.fakes.daemon import ROOT
from tests.faults.canary import planted
from tests.faults.canary_scenarios import SCENARIOS, captured

pytestmark = pytest.mark.proof

MEANT = {captured.__name__, planted.__name__}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What was told of each scenario, by its name; see canary_scenarios.py."""
    command = [sys.executable, "-m", "tests.faults.canary_scenarios"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in MEANT])
def test_nothing_that_was_said_is_told(report: dict[str, Any], name: str) -> None:
    """Whatever is said, in whichever field, on whatever way through, and whatever was answered: it went as it should, and
    there were things told to look at."""
    one = report[name]
    assert one["fault"] is None, one["fault"]
    assert one["leaks"] == []
    assert one["told"]


def test_there_was_something_to_search(report: dict[str, Any]) -> None:
    """Spans of requests, of each of their phases and of steps; metrics; logs; and errors, of hosts' own spans too."""
    spans = {span for one in report.values() for span in one["spans"]}
    phases = {"queue", "prefill", "decode", "parked", "preempted"}
    assert {"text_completion fake", "chat fake", "engine step", "the host", *phases} <= spans
    kinds = {kind for one in report.values() for kind in one["told"]}
    assert {"span", "metrics", "log", "exception"} <= kinds
    assert report["blocked"]["told"]["log"] >= 1
    assert report["a_daemons_log"]["told"]["log"] > 20


def test_content_that_is_asked_for_is_in_two_attributes(report: dict[str, Any]) -> None:
    """With ``capture_content`` what was said to the model and what it answered are in the attributes of the conventions, and
    in nothing else; what else a request says is in neither."""
    one = report["captured"]
    assert one["fault"] is None, one["fault"]
    assert one["leaks"] == []
    told = set(one["captured"])
    assert told >= {
        "prompt",
        "samples",
        "batch",
        "stream",
        "turn",
        "system message",
        "chat message",
        "tool result",
        "an answer",
    }
    assert told & {"stop string", "bad word", "metadata", "tool"} == set()


def test_the_search_finds_what_it_looks_for(report: dict[str, Any]) -> None:
    """In each place, in part, in what caused an error, and as token ids."""
    one = report["planted"]
    assert one["fault"] is None, one["fault"]
    found = {place for _, places, _ in one["leaks"] for place in places}
    places = {
        "span name",
        "span link",
        "span attribute",
        "span event",
        "event attribute",
        "span status",
        "metric attribute",
        "log message",
        "log argument",
        "log extra",
        "warning",
        "argument of a cause",
        "error",
        "note",
        "attribute, as token ids",
        "an answer",
    }
    assert found == places
