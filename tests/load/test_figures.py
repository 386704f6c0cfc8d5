"""Figures of load tests draw what the result has, and nothing that it has not."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.load import canvas, figures
from ferrum_rt.load.figures import Picture, pictures, write_figures
from ferrum_rt.load.results import LoadResult, SweepResult
from tests.load import made

CASES = made.edge_cases()
pytestmark = pytest.mark.proof  # each draws, and matplotlib takes seconds for it
ALL = ["latency", "throughput", "batches", "pages", "requests"]


def picture(result: LoadResult | SweepResult, name: str) -> Picture:
    return next(one for one in pictures(result) if one.name == name)


def axes_of(result: LoadResult | SweepResult, name: str) -> list[Axes]:
    figure = picture(result, name).figure
    assert figure is not None
    return figure.axes


def points_of(line: Line2D) -> list[tuple[Any, ...]]:
    return [tuple(point) for point in np.column_stack(line.get_data()).astype(float).tolist()]


def lines_of(axes: Axes) -> dict[str, list[tuple[Any, ...]]]:
    """By what the legend calls them."""
    return {str(line.get_label()): points_of(line) for line in axes.lines}


def heights_of(axes: Axes, layer: int, at: float) -> set[float]:
    """Of the outline of a stack's layer at a time: where it comes from and where it goes to."""
    outline = np.asarray(axes.collections[layer].get_paths()[0].vertices)
    return set(outline[np.abs(outline[:, 0] - at) < 1e-9, 1].tolist())


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_there_is_a_png_for_whatever_can_be_drawn(case: str, tmp_path: Path) -> None:
    """Twice as fine as it is shown; of the others one is told why."""
    result = CASES[case]

    written = write_figures(result, tmp_path / "made" / "here")

    missing = {
        "errors only": {"latency"},
        "no spans": {"requests"},
        "no samples": {"pages"},
        "neither": {"batches", "pages", "requests"},
        "sweep of nothing": {"frontier"},
    }.get(case, set())
    names_of_all = ["frontier"] if isinstance(result, SweepResult) else ALL
    assert [path.name for path in written] == [f"{name}.png" for name in names_of_all if name not in missing]
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == sorted(path.name for path in written)
    for path in written:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert int.from_bytes(head[16:20]) == 2000
    for one in pictures(result):
        assert (one.figure is None) == (one.name in missing)
        assert one.note.endswith(".")


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    """A host that draws too keeps its settings, and its choice of a backend."""
    before = dict(matplotlib.rcParams)

    write_figures(made.load_result(), tmp_path)

    assert dict(matplotlib.rcParams) == before
    code = "import sys, ferrum_rt.load.figures; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# -- SVG ------------------------------------------------------------------------------------------------------------------


def test_svg_takes_its_colours_from_the_page() -> None:
    """All of them by name, so none is lost on a dark page; what a tip says stays as it is."""
    drawn = picture(made.load_result(), "requests")
    assert drawn.figure is not None
    tips = [f'#e69f00 url(#a) id="b" <{number}>' for number in range(len(drawn.tips))]

    svg = canvas.as_svg(drawn.figure, "requests", 'a "label"', tips)

    without_tips = re.sub(r"<title>.*?</title>", "", svg)
    assert not re.findall(r"#[0-9a-f]{6}", without_tips)
    assert {f"--{name}" for name in re.findall(r"var\(--(\w+)\)", svg)} >= {"--ink", "--orange", "--blue", "--muted"}
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(canvas.PALETTE)
    assert "<title>#e69f00 url(#a) id=&quot;b&quot; &lt;3&gt;</title>" in svg
    assert svg.startswith("<svg viewBox=")
    assert 'aria-label="a &quot;label&quot;"' in svg
    assert "font-family" not in svg
    assert "<style" not in svg


def test_svg_is_the_same_each_time() -> None:
    """A report of the same result is the same to the letter."""
    first, again = (
        [canvas.as_svg(one.figure, one.name, one.title, one.tips) for one in pictures(made.load_result()) if one.figure]
        for _ in range(2)
    )
    assert first == again


def test_colours_differ() -> None:
    """On paper and on a screen, each from each: they are told apart by nothing else when a figure becomes part of a page."""
    for scheme in zip(*canvas.PALETTE.values(), strict=True):
        assert len(set(scheme)) == len(canvas.PALETTE)
        assert all(re.fullmatch(r"#[0-9a-f]{6}", colour) for colour in scheme)
    assert set(canvas.PHASES) == set(Phase)
    assert len(set(canvas.PHASES.values())) == len(Phase)


# -- what they draw -------------------------------------------------------------------------------------------------------


def test_shares_of_times() -> None:
    """Each curve goes from nothing at the shortest time to all at the longest; limits are lines."""
    result = CASES["ordinary"]
    assert isinstance(result, LoadResult)
    completed = [one for one in result.repeats[0].requests if one.error is None]

    ttft, itl, e2e = axes_of(result, "latency")

    curve, limit = ttft.lines
    times = sorted(one.ttft_s for one in completed if one.ttft_s is not None)
    assert points_of(curve) == [(times[0], 0.0), *((time, pytest.approx((at + 1) / 11)) for at, time in enumerate(times))]
    assert points_of(limit) == [(0.12, 0.0), (0.12, 1.0)]
    assert points_of(itl.lines[1])[0][0] == 0.05
    assert points_of(itl.lines[0])[-1] == (max(gap for one in completed for gap in one.itl_s), 1.0)
    assert len(e2e.lines) == 1
    assert max(x for x, _ in points_of(e2e.lines[0])) == max(one.e2e_s for one in completed)


def test_repeats_are_taken_together_for_times() -> None:
    """And one by one for what is drawn over time, which says so."""
    result = CASES["three repeats"]

    assert len(points_of(axes_of(result, "latency")[0].lines[0])) == 1 + 6 + 4 + 5
    assert all(picture(result, name).note.endswith("Repeat 1 of 3.") for name in ALL[1:])
    assert "Repeat" not in picture(CASES["ordinary"], "throughput").note


def test_throughput_has_every_token_and_request() -> None:
    """The areas are what came: all tokens, and the requests that were completed and that were due."""
    result = CASES["ordinary"]
    assert isinstance(result, LoadResult)

    tokens, requests = axes_of(result, "throughput")

    def areas(axes: Axes) -> list[float]:
        found = []
        for patch in axes.patches:
            assert isinstance(patch, StepPatch)
            values, edges, _ = patch.get_data()
            found.append(sum(value * (end - begin) for value, begin, end in zip(values, edges, edges[1:], strict=False)))
        return found

    assert areas(tokens) == pytest.approx([12 * 8] * 2)
    assert areas(requests) == pytest.approx([11, 11, 12])


def test_batches_are_the_steps() -> None:
    """Decodes with prefills on them, the prompts' tokens, and the engine's requests as they were sampled."""
    result = CASES["ordinary"]
    assert isinstance(result, LoadResult)

    batch, chunks, engine = axes_of(result, "batches")

    assert heights_of(batch, 0, 0.3) == {0.0, 3.0}
    assert heights_of(batch, 1, 0.3) == {3.0, 4.0}
    sticks = points_of(chunks.lines[0])
    steps = [one for one in result.repeats[0].spans if one.name == names.STEP]
    assert [(x, y) for x, y in sticks if y > 0] == [
        (pytest.approx(0.1 * number), 100.0) for number in range(len(steps)) if number % 2
    ]
    samples = result.repeats[0].samples
    for name in ("running", "waiting", "parked"):
        assert lines_of(engine)[name] == [(one.at_s, getattr(one, name)) for one in samples]


def test_an_idle_engine_has_no_batch() -> None:
    """Where no step was recorded for long, none was done."""
    result = made.load_result()
    repeat = result.repeats[0]
    busy = [one for one in repeat.spans if not 0.25 < (one.start_ns - repeat.began_ns) / 1e9 < 0.85]
    idle = msgspec.structs.replace(result, repeats=[msgspec.structs.replace(repeat, spans=busy)])

    steps = figures._steps(idle.repeats[0])
    around: list[tuple[Any, ...]] = [(step.at_s, step.decodes) for step in steps if 0.15 < step.at_s < 0.95]
    assert around == [
        (pytest.approx(0.2), 3),
        (pytest.approx(0.22), 0),
        (pytest.approx(0.9), 3),
    ]
    assert steps[-1].decodes == 0


def test_pages_add_up() -> None:
    """Active, cached and free ones are all."""
    result = CASES["ordinary"]
    assert isinstance(result, LoadResult)

    (axes,) = axes_of(result, "pages")

    for sample in result.repeats[0].samples:
        assert sample.pages_active in heights_of(axes, 0, sample.at_s)
        assert sample.pages_active + sample.pages_cached in heights_of(axes, 1, sample.at_s)
        assert 100.0 in heights_of(axes, 2, sample.at_s)


def bars_of(result: LoadResult) -> list[tuple[Any, ...]]:
    (axes,) = axes_of(result, "requests")
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        (round(bar.get_y() + 0.4), to_hex(bar.get_facecolor()), bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars
    ]


def test_bars_are_the_spans_of_phases() -> None:
    """A row for each request in the order of arrival, each phase in its colour; ticks are chunks, a cross is a failure."""
    result = made.load_result()
    repeat = result.repeats[0]
    phases = [one for one in repeat.spans if one.name in set(Phase)]

    bars = bars_of(result)

    rows = {f"{row:032x}": row for row in range(1, 13)}
    assert bars == [
        (
            rows[one.trace_id],
            canvas.PHASES[Phase(one.name)],
            pytest.approx((one.start_ns - made.BEGAN_NS) / 1e9),
            pytest.approx((one.end_ns - made.BEGAN_NS) / 1e9),
        )
        for one in phases
    ]
    (axes,) = axes_of(result, "requests")
    ticks, crosses, *_ = axes.lines
    assert len([x for x, _ in points_of(ticks) if math.isnan(x)]) == 2 * 12
    assert points_of(crosses) == [(pytest.approx(repeat.requests[8].end_s), 9.0)]
    drawn = picture(result, "requests")
    assert len(drawn.tips) == len(phases)
    assert drawn.tips[0] == "request 1 of ada: queue for 20.0 ms, from 0.001 s to 0.021 s"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [*(phase.value for phase in Phase), "failed"]


def crowd(*numbers: int) -> LoadResult:
    """So many requests come at once, 0.1 s after those before; each takes 0.22 s."""
    requests = [
        msgspec.structs.replace(made.request(index), trace_id=f"{10 * index + twin + 1:032x}", index=10 * index + twin)
        for index, number in enumerate(numbers)
        for twin in range(number)
    ]
    return made.load_result(made.repeat(requests))


@pytest.mark.parametrize(
    ("result", "most_phases", "title"),
    [
        (crowd(*[1] * 30), 3000, "All 30 requests"),
        (crowd(*[3] * 60), 3000, "Requests 1 to 135 of 180, where they came the closest"),
        (crowd(*[1] * 60, *[2] * 20), 3000, "Requests 36 to 100 of 100, where they came the closest"),
        (crowd(*[1] * 60, *[2] * 20), 300, "Requests 36 to 100 of 100, where they came the closest"),
        (crowd(*[5] * 40, *[6] * 40), 3000, "Requests 201 to 350 of 440, where they came the closest"),
        (crowd(*[5] * 60), 3000, "Requests 1 to 150 of 300, where they came the closest"),
        (crowd(1, 1, 1), 5, "Requests 1 to 1 of 3, where they came the closest"),
    ],
)
def test_no_more_rows_than_can_be_read(
    result: LoadResult, most_phases: int, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the time in which most came, and the figure says which they are."""
    monkeypatch.setattr(figures, "MOST_PHASES", most_phases)

    (axes,) = axes_of(result, "requests")

    assert axes.get_title(loc="left") == title
    rows = {row for row, *_ in bars_of(result)}
    first, last = (int(number) for number in (re.findall(r"\d+", title) if "to" in title else (1, 30))[:2])
    assert rows == set(range(first, last + 1))


def test_the_frontier() -> None:
    """Points in the order of rates, filled where the limits were met; the limits and the highest rate are lines."""
    result = CASES["sweep"]

    shares, ttft, itl = axes_of(result, "frontier")

    line, met, unmet, required, highest = shares.lines
    assert points_of(line) == [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (3.5, 0.5), (4.0, 0.5)]
    assert [x for x, _ in points_of(met)] == [1.0, 2.0, 3.0]
    assert [x for x, _ in points_of(unmet)] == [3.5, 4.0]
    assert (met.get_markerfacecolor(), unmet.get_markerfacecolor()) == (canvas.GREEN, canvas.PAPER)
    assert (points_of(required)[0][1], points_of(highest)[0][0]) == (0.95, 3.0)
    assert isinstance(result, SweepResult)
    for axes, name, limit in ((ttft, "ttft_s", 0.12), (itl, "itl_s", 0.05)):
        by_rate = sorted(result.points, key=lambda point: point.rate)
        assert points_of(axes.lines[0]) == [(point.rate, getattr(point.summary, name).p99) for point in by_rate]
        assert points_of(axes.lines[3])[0][1] == limit


def test_a_sweep_that_met_nothing_marks_nothing() -> None:
    """Neither a rate nor a time that was not measured, nor a limit that there is not."""
    shares, ttft, _ = axes_of(CASES["sweep that met nothing"], "frontier")
    assert len(shares.lines) == 4
    assert picture(CASES["sweep that met nothing"], "frontier").note.startswith("No rate that was tried met the limits.")
    _, ttft, itl = axes_of(CASES["sweep without an answer"], "frontier")
    assert [points_of(line) for axes in (ttft, itl) for line in axes.lines] == [[]] * 6
