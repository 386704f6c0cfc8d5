"""The report of a load test says what its JSON says, to a reader and to a browser, and needs nothing but itself."""

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.load import shown
from ferrum_rt.load.report import write_report
from ferrum_rt.load.results import LoadResult, SweepResult
from tests.load import chromium, made

CASES = made.edge_cases()
TIMES = ("ttft_s", "itl_s", "tpot_s", "e2e_s", "send_delay_s")
PERCENTILES = ("mean", "p50", "p90", "p95", "p99", "max")
UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6, "%": 1e-2}
HOSTILE = (
    """</script><script>document.title="x"</script><img src=x onerror="alert(1)">"""
    """'"&<!--{{ 7 * 7 }}$\\frac url(#a) id="b\""""
)


class Reading(NamedTuple):
    """A number on the page."""

    key: str
    exact: str
    text: str


class Reader(HTMLParser):
    """What is on a page: its numbers, and the rest of its text but for that of figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.readings: list[Reading] = []
        self.text, self.summary = "", ""
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag in ("data", "svg", "style", "script"):
            self._inside.append(tag)
        if tag == "data":
            self.readings.append(Reading(given["data-key"] or "", given["data-value"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        match self._inside:
            case []:
                self.text += f" {data}"
            case ["data"]:
                self.readings[-1] = self.readings[-1]._replace(text=self.readings[-1].text + data)
            case ["script"]:
                self.summary += data


def page_of(result: LoadResult | SweepResult, directory: Path) -> str:
    path = directory / "report.html"
    write_report(result, path)
    return path.read_text(encoding="utf-8")


def number_at(facts: Any, key: str) -> Any:
    """What a dotted key leads to; parts of it may have dots themselves."""
    if key == "":
        return facts
    parts: Mapping[str, Any] = facts if isinstance(facts, dict) else {str(at): part for at, part in enumerate(facts)}
    for name, part in parts.items():
        if f"{key}.".startswith(f"{name}."):
            return number_at(part, key[len(name) + 1 :])
    raise KeyError(key)


def assert_shows(text: str, exact: float) -> None:
    """It is that number, rounded to what is shown of it, and by no more than half a per cent."""
    number, _, unit = text.partition(" ")
    digits = Decimal(number.replace(",", ""))
    last = Decimal(1).scaleb(int(digits.as_tuple().exponent))
    assert abs(float(digits) * UNITS[unit] - exact) <= 0.500001 * float(last) * UNITS[unit]
    assert abs(float(digits) * UNITS[unit] - exact) <= max(0.00501 * abs(exact), 0.000501 * (unit == "%"))


def assert_is_the_json(readings: list[Reading], result: LoadResult | SweepResult) -> None:
    """Each number is that of the result's file, and all that matter are there."""
    facts = msgspec.json.decode(msgspec.json.encode(result))
    for reading in readings:
        assert json.loads(reading.exact) == number_at(facts, reading.key), reading
        assert_shows(reading.text, json.loads(reading.exact))
    assert {reading.key for reading in readings} >= set(expected_keys(facts))


def expected_keys(facts: dict[str, Any]) -> Iterator[str]:
    if "points" in facts:
        yield "required_share"
        for index, point in enumerate(facts["points"]):
            yield from (f"points.{index}.{name}" for name in ("rate", "good_share", "summary.goodput.mean"))
            yield from (
                f"points.{index}.summary.{name}.{part}"
                for name in ("ttft_s", "itl_s")
                for part in ("p50", "p99")
                if point["summary"][name] is not None
            )
        return
    summary = facts["summary"]
    yield from (f"summary.{name}.{part}" for name in TIMES for part in PERCENTILES if summary[name] is not None)
    yield from (f"summary.{name}" for name in ("requests", "completed"))
    yield from (f"summary.errors.{code}" for code in summary["errors"])
    for name in ("request_rate", "output_token_rate", "total_token_rate", "goodput"):
        yield f"summary.{name}.mean"
        if summary[name]["margin"] is not None:
            yield f"summary.{name}.margin"
    yield from (f"limits.{name}" for name, limit in facts["limits"].items() if limit is not None)
    yield from (f"repeats.{index}.duration_s" for index in range(len(facts["repeats"])))
    if summary["spans_dropped"]:
        yield "summary.spans_dropped"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_report_says_what_the_json_says(case: str, tmp_path: Path) -> None:
    """Whatever there is to say: each number is rounded from the exact one, which is beside it."""
    result = CASES[case]

    page = Reader(page_of(result, tmp_path))

    assert_is_the_json(page.readings, result)
    facts, whole = json.loads(page.summary), msgspec.json.decode(msgspec.json.encode(result))
    for repeat in whole.get("repeats", ()):
        assert {repeat.pop(name) is not None for name in ("requests", "samples", "spans")} == {True}
    assert facts == whole


@pytest.mark.slow
def test_no_number_is_without_its_value(tmp_path: Path) -> None:
    """What is written beside the numbers that say their exact value has no digits, but for names and the date."""
    page = Reader(page_of(made.load_result(), tmp_path))

    text = page.text.replace(made.LOAD["prompt"], "")  # type: ignore[arg-type]
    text = re.sub(r"\bp\d\d\b|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "", text)
    assert not re.findall(r"\d+", text)
    assert "2026-09-21 14:13:20 UTC" in page.text


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no spans", "neither", "errors only", "sweep of nothing"])
def test_a_figure_that_is_left_out_says_why(case: str, tmp_path: Path) -> None:
    """In its place, and the others are there."""
    page = Reader(page_of(CASES[case], tmp_path))

    reasons = {
        "no spans": ["No spans of requests were recorded.", "Spans of the engine's steps are missing."],
        "neither": ["No spans of the engine's steps were recorded", "Nobody looked at the engine while it ran."],
        "errors only": ["No request was completed."],
        "sweep of nothing": ["No rate was tried."],
    }[case]
    assert all(reason in page.text for reason in reasons)
    drawn = [tag for tag, _ in page.tags].count("svg")
    assert drawn == {"no spans": 4, "neither": 2, "errors only": 4, "sweep of nothing": 0}[case]


def hostile_result() -> LoadResult:
    """With a name that would like to be a page of its own wherever a name can be."""
    requests = [made.request(0, client=HOSTILE), made.request(1, error=f"{HOSTILE}.with.dots", client=HOSTILE)]
    result = made.load_result(made.repeat(requests), target=HOSTILE)
    names = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE, 3]}}
    return msgspec.structs.replace(result, load=names, machine=names)


@pytest.mark.slow
def test_names_from_outside_are_text(tmp_path: Path) -> None:
    """Of clients, models and errors: they are shown to the letter, and make no element and end none."""
    result = hostile_result()

    text = page_of(result, tmp_path)

    harmless = Reader(page_of(msgspec.structs.replace(result, target="x", load={}, machine={}), tmp_path))
    page = Reader(text)
    assert page.text.count(HOSTILE) >= 7
    kinds = [tag for tag, _ in page.tags]
    assert (kinds.count("script"), kinds.count("img")) == (1, 0)
    assert set(kinds) == {kind for kind, _ in harmless.tags}
    assert json.loads(page.summary)["target"] == HOSTILE
    assert_is_the_json(page.readings, result)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ordinary", "sweep"])
def test_a_page_refers_to_nothing_but_itself(case: str, tmp_path: Path) -> None:
    """No address of anything else is on it; the parts that figures refer to are there once."""
    text = page_of(CASES[case], tmp_path)

    page = Reader(text)
    references = [value for _, given in page.tags for name, value in given.items() if name.endswith(("href", "src"))]
    references += [f"#{found}" for found in re.findall(r"url\(#([^)]*)\)", text)]
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    assert {reference for reference in references if reference != "data:,"} <= {f"#{name}" for name in ids}
    assert len(references) > 20
    assert not re.search(r"https?:|@import|url\([^#]", text)


@pytest.mark.slow
def test_a_long_test_makes_no_large_report(tmp_path: Path) -> None:
    """A thousand requests in 100 s, each with its spans and 180 tokens, take less than 2 MB."""
    repeat = made.repeat([made.request(index, tokens=180) for index in range(1000)])

    assert len(page_of(made.load_result(repeat), tmp_path).encode()) < 2_000_000


def test_without_matplotlib_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to get it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"ferrum-rt\[plot\]"):
        write_report(made.load_result(), tmp_path / "report.html")


numbers = st.floats(min_value=1e-9, max_value=1e9)


@given(numbers)
def test_times_and_rates_are_rounded_to_three_digits(value: float) -> None:
    """In a unit that keeps them short; never by more than half of the last digit."""
    assert_shows(shown.seconds(value), value)
    assert_shows(shown.rate(value), value)
    assert len(re.sub(r"[^1-9]", "", shown.rate(min(value, 999.0)))) <= 3


@given(st.floats(min_value=0, max_value=1))
def test_shares_are_per_cent(value: float) -> None:
    """What is not all does not look like it, unless a ten-thousandth of a per cent is missing."""
    assert_shows(shown.share(value), value)
    assert (shown.share(value) == "100.0 %") == (value == 1.0)


@given(st.integers(min_value=0, max_value=10**12))
def test_counts_are_exact(value: int) -> None:
    """All digits of them, in groups."""
    assert int(shown.count(value).replace(",", "")) == value
    assert int(shown.plain(value)) == value


# -- in a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """Where one is installed; where FERRUM_NEEDS_CHROMIUM says that it must be, its lack is a failure."""
    binary = chromium.find()
    if binary is None:
        assert not os.environ.get("FERRUM_NEEDS_CHROMIUM"), "chromium is not installed"
        pytest.skip("chromium is not installed")
    with chromium.running(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


SHOWN = "[...document.querySelectorAll('[data-key]')].map(one => [one.dataset.key, one.dataset.value, one.innerText])"
FIGURES = "[...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect()).map(one => [one.width, one.height])"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ordinary", "errors only", "three repeats", "sweep"])
def test_a_browser_shows_what_the_json_says(browser: chromium.Chromium, case: str, tmp_path: Path) -> None:
    """Without an error, a word on the console or a request to anybody."""
    result, path = CASES[case], tmp_path / "report.html"
    write_report(result, path)

    page = browser.open(path)

    assert_is_the_json([Reading(*reading) for reading in page.evaluate(SHOWN)], result)
    assert json.loads(page.evaluate("document.getElementById('summary').textContent"))["target"] == result.target
    figures = page.evaluate(FIGURES)
    assert len(figures) == {"ordinary": 5, "errors only": 4, "three repeats": 5, "sweep": 1}[case]
    assert all(width > 600 and height > 150 for width, height in figures)
    assert page.requested == [path.as_uri()]
    assert page.complaints == []


@pytest.mark.slow
def test_a_browser_sees_no_more_than_text_in_names(browser: chromium.Chromium, tmp_path: Path) -> None:
    """Nothing of a hostile name runs, or is asked for; a bar of a figure tells it to who points there."""
    path = tmp_path / "report.html"
    write_report(hostile_result(), path)

    page = browser.open(path)

    assert page.evaluate("document.title") == f"Load test: {HOSTILE}"
    assert page.evaluate("document.querySelector('h1').textContent") == HOSTILE
    assert page.evaluate("document.querySelectorAll('script, img').length") == 1
    tips = page.evaluate("[...document.querySelectorAll('svg g > title')].map(one => one.textContent)")
    for row, tip in zip((1, 1, 1, 2, 2, 2), tips, strict=True):
        assert tip.startswith(f"request {row} of {HOSTILE}: ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    assert page.requested == [path.as_uri()]
    assert page.complaints == []


@pytest.mark.slow
def test_a_page_has_the_colours_of_its_reader(browser: chromium.Chromium, tmp_path: Path) -> None:
    """Light on dark, or dark on light; in figures too. It fits a narrow screen."""
    path = tmp_path / "report.html"
    write_report(made.load_result(), path)
    colours = """(() => {
        const parts = element => getComputedStyle(element).PROPERTY.match(/[\\d.]+/g).slice(0, 3);
        const bright = element => parts(element).reduce((sum, part) => sum + Number(part), 0);
        return bright(document.querySelector('SELECTOR')) / 765;
    })()"""

    for scheme, is_dark in (("light", False), ("dark", True)):
        page = browser.open(path, scheme=scheme, width=420)
        paper, text, figure = (
            page.evaluate(colours.replace("PROPERTY", name).replace("SELECTOR", selector))
            for name, selector in (("backgroundColor", "body"), ("color", "body"), ("fill", "svg text"))
        )
        assert (paper < 0.2, text > 0.8, figure > 0.5) == (is_dark, is_dark, is_dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
