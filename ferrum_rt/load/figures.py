"""Pictures of a load test: where its times lie, and what went on while it ran. The repeats' times are taken together; what
is drawn over time is the first repeat."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.load import canvas, shown
from ferrum_rt.load.results import Limits, LoadResult, Percentiles, Repeat, SpanRecord, SweepResult
from ferrum_rt.load.spans import RequestTree, request_trees

MOST_ROWS, MOST_PHASES = 150, 3000  # of the chart of requests: what can be read
_WINDOW = 20  # and as many times as long as nine of ten requests
_MOST_POINTS = 4000  # of a line
# Engines record a step at least every 0.1 s while there are any: where there is none for so long, there was nothing to do.
_IDLE_S = 0.25
_BIN_WIDTHS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_Item = TypeVar("_Item")


class Picture(NamedTuple):
    """``name`` is its file's. ``note`` says what one sees, or why there is no ``figure``. ``tips`` are canvas.as_svg's."""

    name: str
    title: str
    note: str
    figure: Figure | None
    tips: Sequence[str] = ()


def pictures(result: LoadResult | SweepResult) -> list[Picture]:
    """All that there are of it, and those that there could be with more known."""
    with canvas.style():
        if isinstance(result, SweepResult):
            return [_frontier(result)]
        return [_latencies(result), _throughput(result), _batches(result), _pages(result), _requests(result)]


def write_figures(result: LoadResult | SweepResult, directory: Path) -> list[Path]:
    """A PNG for each picture that can be drawn, as NAME.png. The directory is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures(result):
        if picture.figure is not None:
            written.append(directory / f"{picture.name}.png")
            canvas.save_png(picture.figure, written[-1])
    return written


# -- latencies ------------------------------------------------------------------------------------------------------------


def _latencies(result: LoadResult) -> Picture:
    completed = [record for repeat in result.repeats for record in repeat.requests if record.error is None]
    summary, limits = result.summary, result.limits
    curves = [
        ("Time to first token", canvas.ORANGE, [one.ttft_s for one in completed if one.ttft_s is not None], limits.ttft_s),
        ("Time between tokens", canvas.BLUE, [gap for one in completed for gap in one.itl_s], limits.itl_s),
        ("End to end", canvas.GREEN, [one.e2e_s for one in completed], None),
    ]
    found = (summary.ttft_s, summary.itl_s, summary.e2e_s)
    panels = [(*curve, summed) for curve, summed in zip(curves, found, strict=True) if curve[2] and summed is not None]
    if not panels:
        return Picture("latency", "Latency", "No request was completed.", None)
    figure = canvas.blank(3.2)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, colour, values, limit, summed) in zip(row, panels, strict=True):
        _draw_shares(axes, values, colour, limit)
        axes.set_title(f"{title}\np50 {shown.seconds(summed.p50)} · p99 {shown.seconds(summed.p99)}")
    row[0].set(ylabel="share that took no longer", ylim=(0, 1.02))
    row[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    note = "Of completed requests, from the time at which they were due."
    return Picture("latency", "Latency", note + _of_means(limits), figure)


def _of_means(limits: Limits) -> str:
    return "" if limits.itl_s is None else " The limit of the time between tokens holds for a request's mean."


def _draw_shares(axes: Axes, values: Sequence[float], colour: str, limit: float | None) -> None:
    """How many of ``values`` (seconds) are at most so large: a staircase, thinned where nobody could see its steps."""
    ordered = np.sort(np.asarray(values))
    at = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), 500)).astype(int))
    times, shares = ordered[at], (at + 1) / len(ordered)
    axes.plot([times[0], *times], [0.0, *shares], color=colour, drawstyle="steps-post")
    if limit is not None:
        axes.axvline(limit, color=canvas.INK, linestyle="--", linewidth=1)
        _tell_limit(axes, limit)
    _scale_seconds(axes, "x", [ordered[0], ordered[-1], *([] if limit is None else [limit])])


def _tell_limit(axes: Axes, limit: float) -> None:
    axes.annotate(
        f"limit {shown.seconds(limit)}",
        (limit, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=90,
        rotation_mode="anchor",
        color=canvas.INK,
        fontsize=8,
    )


def _scale_seconds(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Logarithmic if they are of different magnitudes, with ticks that say their unit."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    least, most = min(values), max(values)
    if least > 0 and most / least > 20:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 30 else (1, 3) if most / least < 300 else (1,)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(4))
        if which == "y":
            axes.set_ylim(bottom=0)
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    for unit, least in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= least * 0.999:
            return f"{value / least:g} {unit}"
    return "0"


# -- over time ------------------------------------------------------------------------------------------------------------


def _of_repeat(result: LoadResult) -> str:
    return "" if len(result.repeats) == 1 else f" Repeat 1 of {len(result.repeats)}."


def _throughput(result: LoadResult) -> Picture:
    repeat = result.repeats[0]
    figure = canvas.blank(4.4)
    tokens, requests = figure.subplots(2, 1, sharex=True)
    chunks = [chunk for record in repeat.requests for chunk in record.chunks]
    edges = _bins(repeat.duration_s, most=120)
    _draw_rate(tokens, edges, [chunk.at_s for chunk in chunks], [chunk.tokens for chunk in chunks], color=canvas.BLUE)
    tokens.set(title=f"Output tokens per second, in bins of {edges[1] - edges[0]:g} s", ylim=(0, None))
    edges = _bins(repeat.duration_s, most=40)
    ended = [record.end_s for record in repeat.requests if record.error is None]
    _draw_rate(requests, edges, ended, [1] * len(ended), color=canvas.GREEN, label="completed")
    due = [record.due_s for record in repeat.requests]
    _draw_rate(requests, edges, due, [1] * len(due), color=canvas.MUTED, label="due", fill=False)
    requests.set(
        title=f"Requests per second, in bins of {edges[1] - edges[0]:g} s",
        xlabel="seconds",
        xlim=(0, repeat.duration_s),
        ylim=(0, None),
    )
    _legend(requests)
    note = "Tokens count when their chunk came, those of failed requests too; requests when they ended."
    return Picture("throughput", "Throughput over time", note + _of_repeat(result), figure)


def _bins(duration_s: float, most: int) -> list[float]:
    """Edges of equal bins of a round width, ``most`` of them; the last one takes what is left, half of a bin or more."""
    width = next((width for width in _BIN_WIDTHS if duration_s <= width * most), duration_s / most)
    count = max(1, round(duration_s / width))
    return [*(width * number for number in range(count)), duration_s]


def _draw_rate(
    axes: Axes,
    edges: Sequence[float],
    moments: Sequence[float],
    weights: Sequence[int],
    *,
    color: str,
    label: str | None = None,
    fill: bool = True,
) -> None:
    """Per second."""
    rates = np.histogram(moments, edges, weights=weights)[0] / np.diff(edges)
    if fill:
        axes.stairs(rates, edges, color=color, fill=True, alpha=0.22)
    axes.stairs(rates, edges, color=color, linewidth=1.4, linestyle="-" if fill else "--", label=label)


class _Step(NamedTuple):
    at_s: float
    decodes: float
    prefills: float
    prefill_tokens: float


def _batches(result: LoadResult) -> Picture:
    title, repeat = "Batches over time", result.repeats[0]
    steps, samples = _steps(repeat), _thin(repeat.samples)
    if not steps and not samples:
        return Picture(
            "batches", title, "No spans of the engine's steps were recorded, and nobody looked at it while it ran.", None
        )
    figure = canvas.blank(1.2 + 1.7 * (2 * bool(steps) + bool(samples)))
    panels = iter(figure.subplots(2 * bool(steps) + bool(samples), 1, sharex=True, squeeze=False)[:, 0])
    if steps:
        axes, at = next(panels), [step.at_s for step in steps]
        layers = ([step.decodes for step in steps], [step.prefills for step in steps])
        _stack(axes, at, layers, ("decodes", "prefills"), (canvas.BLUE, canvas.ORANGE))
        axes.set_title("Sequences in a step")
        axes = next(panels)
        chunks = [(step.at_s, step.prefill_tokens) for step in steps if step.prefill_tokens]
        axes.plot(*_sticks([(at_s, 0.0, tokens) for at_s, tokens in chunks]), color=canvas.ORANGE, linewidth=1)
        axes.set(title="Tokens of prompts in a step", ylim=(0, None))
    if samples:
        axes = next(panels)
        for name, colour in (("running", canvas.BLUE), ("waiting", canvas.GREY), ("parked", canvas.PURPLE)):
            counts = [getattr(sample, name) for sample in samples]
            axes.plot([sample.at_s for sample in samples], counts, color=colour, label=name, drawstyle="steps-post")
        axes.set(title="Requests in the engine", ylim=(0, None))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend(axes)
    axes.set(xlabel="seconds", xlim=(0, repeat.duration_s))
    note = (
        "Of the engine's steps at most ten a second are recorded." if steps else "Spans of the engine's steps are missing."
    )
    return Picture("batches", title, note + _of_repeat(result), figure)


def _steps(repeat: Repeat) -> Sequence[_Step]:
    """Those that spans tell of, in their order, and between them steps of nothing where the engine had nothing to do."""
    spans = sorted((span for span in repeat.spans if span.name == names.STEP), key=lambda span: span.start_ns)
    found: list[_Step] = []
    ended = math.inf
    for span in spans:
        at_s = (span.start_ns - repeat.began_ns) / 1e9
        if at_s - ended > _IDLE_S:
            found.append(_Step(ended, 0, 0, 0))
        counts = (_count(span, key) for key in (names.STEP_DECODES, names.STEP_PREFILLS, names.STEP_PREFILL_TOKENS))
        found.append(_Step(at_s, *counts))
        ended = (span.end_ns - repeat.began_ns) / 1e9
    return _thin([*found, _Step(ended, 0, 0, 0)] if found else [])


def _count(span: SpanRecord, key: str) -> float:
    value = span.attributes.get(key)
    return value if isinstance(value, int | float) else 0


def _pages(result: LoadResult) -> Picture:
    title, repeat = "Pages over time", result.repeats[0]
    samples = _thin(repeat.samples)
    if not samples:
        return Picture("pages", title, "Nobody looked at the engine while it ran.", None)
    figure = canvas.blank(2.8)
    axes = figure.subplots()
    layers = [[getattr(sample, f"pages_{state}") for sample in samples] for state in ("active", "cached", "free")]
    at = [sample.at_s for sample in samples]
    _stack(axes, at, layers, ("active", "cached", "free"), (canvas.BLUE, canvas.SKY, canvas.GRID))
    axes.set(title="Pages of keys and values", xlabel="seconds", xlim=(0, repeat.duration_s))
    note = "Active pages are a live request's; cached ones the prefix cache's, or a session's between its turns."
    return Picture("pages", title, note + _of_repeat(result), figure)


def _stack(
    axes: Axes, at: Sequence[float], layers: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    axes.stackplot(at, *layers, labels=labels, colors=colours, step="post", linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(axes)


def _thin(items: Sequence[_Item]) -> Sequence[_Item]:
    """As many as a line can show."""
    return items[:: max(1, math.ceil(len(items) / _MOST_POINTS))]


def _sticks(sticks: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Each of (where, from, to); as one line with gaps, which is a hundredth of as many lines in SVG."""
    across, along = list[float](), list[float]()
    for where, begin, end in sticks:
        across += [where, where, math.nan]
        along += [begin, end, math.nan]
    return across, along


def _legend(axes: Axes) -> None:
    """Above the figure, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, handlelength=1.2, fontsize=8.5)


# -- requests -------------------------------------------------------------------------------------------------------------


def _requests(result: LoadResult) -> Picture:
    """A row for each request, in the order in which they came."""
    title, repeat = "Requests", result.repeats[0]
    trees = request_trees(repeat.spans)
    if not trees:
        return Picture("requests", title, "No spans of requests were recorded.", None)
    readable = _readable(trees)
    rows = [(number + 1, trees[number]) for number in readable]
    figure = canvas.blank(min(9.0, 1.3 + 0.07 * max(len(rows), 12)))
    axes = figure.subplots()
    clients = {record.trace_id: record.client for record in repeat.requests if record.trace_id is not None}
    tips: list[str] = []
    for row, tree in rows:
        client = tree.root.attributes.get(names.CLIENT, clients.get(tree.root.trace_id, ""))
        _draw_request(axes, row, tree, f"request {row} of {client}" if client else f"request {row}", repeat, tips)
    chunks = [(_at(repeat, at), row - 0.4, row + 0.4) for row, tree in rows for at in _chunks(tree)]
    axes.plot(*_sticks(chunks), color=canvas.INK, linewidth=0.6)
    errors = [(_at(repeat, tree.root.end_ns), row) for row, tree in rows if tree.root.is_error]
    axes.plot([at for at, _ in errors], [row for _, row in errors], "x", color=canvas.INK, markersize=4)
    begin, end = _at(repeat, rows[0][1].root.start_ns), max(_at(repeat, tree.root.end_ns) for _, tree in rows)
    margin = 0.01 * (end - begin)
    axes.set(
        title=_told(readable, len(trees)),
        xlabel="seconds",
        ylabel="request, in order of arrival",
        xlim=(begin - margin, end + margin),
        ylim=(rows[-1][0] + 0.6, rows[0][0] - 0.6),
    )
    axes.grid(visible=False, axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _explain_phases(axes, rows, has_errors=bool(errors))
    note = "Drawn from the spans. A tick is a step that computes a part of a prompt; point at a bar to read it."
    return Picture("requests", title, note + _of_repeat(result), figure, tips)


def _readable(trees: Sequence[RequestTree]) -> range:
    """Where most requests came in so short a time that the longer ones of them can be seen: as indices, of one at least."""
    starts = [tree.root.start_ns for tree in trees]
    durations = sorted(tree.root.end_ns - tree.root.start_ns for tree in trees)
    window_ns = _WINDOW * durations[int(0.9 * len(durations))]
    best, end, phases = range(1), 0, 0
    for begin, first in enumerate(trees):
        while end < len(trees) and end - begin < MOST_ROWS:
            too_late = starts[end] - starts[begin] > window_ns
            if end > begin and (too_late or phases + len(trees[end].phases) > MOST_PHASES):
                break
            phases += len(trees[end].phases)
            end += 1
        best = max(best, range(begin, end), key=lambda rows: (len(rows), starts[rows[0]] - starts[rows[-1]]))
        phases -= len(first.phases)
    return best


def _told(shown_here: range, total: int) -> str:
    if len(shown_here) == total:
        return f"All {total:,} requests"
    return f"Requests {shown_here.start + 1:,} to {shown_here.stop:,} of {total:,}, where they came the closest"


def _draw_request(axes: Axes, row: int, tree: RequestTree, who: str, repeat: Repeat, tips: list[str]) -> None:
    for span in tree.phases[:MOST_PHASES]:
        begin, end = _at(repeat, span.start_ns), _at(repeat, span.end_ns)
        colour = canvas.PHASES[Phase(span.name)]
        bar = Rectangle((begin, row - 0.4), end - begin, 0.8, color=colour, linewidth=0, clip_on=False)
        bar.set_gid(f"tip-{len(tips)}")
        axes.add_patch(bar)
        tips.append(f"{who}: {span.name} for {shown.seconds(end - begin)}, from {begin:.3f} s to {end:.3f} s")


def _chunks(tree: RequestTree) -> Iterator[int]:
    """When its prompt's chunks were on their way, in nanoseconds."""
    for span in tree.phases:
        yield from (at for name, at, _ in span.events if name == names.CHUNK_EVENT)


def _at(repeat: Repeat, moment_ns: int) -> float:
    return (moment_ns - repeat.began_ns) / 1e9


def _explain_phases(axes: Axes, rows: Sequence[tuple[int, RequestTree]], *, has_errors: bool) -> None:
    seen = {span.name for _, tree in rows for span in tree.phases}
    phases = [(phase, colour) for phase, colour in canvas.PHASES.items() if phase in seen]
    handles: list[Artist] = [Patch(color=colour, label=phase.value) for phase, colour in phases]
    if has_errors:
        handles += axes.plot([], [], "x", color=canvas.INK, markersize=4, label="failed")
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, handlelength=1.2, fontsize=8.5)


# -- a sweep --------------------------------------------------------------------------------------------------------------


def _frontier(result: SweepResult) -> Picture:
    title = "What it can take"
    points = sorted(result.points, key=lambda point: point.rate)
    if not points:
        return Picture("frontier", title, "No rate was tried.", None)
    figure = canvas.blank(6.4)
    shares, ttft, itl = figure.subplots(3, 1, sharex=True)
    rates, are_met = [point.rate for point in points], [point.is_met for point in points]
    _draw_points(shares, rates, [point.good_share for point in points], are_met, canvas.GREEN)
    shares.axhline(result.required_share, color=canvas.INK, linestyle="--", linewidth=1)
    shares.set(title=f"Share of good requests; {shown.share(result.required_share)} are required", ylim=(-0.03, 1.05))
    shares.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    limits = result.limits
    for axes, what, colour, times, limit in (
        (ttft, "Time to first token", canvas.ORANGE, [point.summary.ttft_s for point in points], limits.ttft_s),
        (itl, "Time between tokens", canvas.BLUE, [point.summary.itl_s for point in points], limits.itl_s),
    ):
        _draw_p99(axes, rates, times, are_met, colour, limit)
        axes.set_title(f"{what}, p99" + ("" if limit is None else f"; the limit is {shown.seconds(limit)}"))
    itl.set_xlabel("requests per second")
    for axes in (shares, ttft, itl):
        if result.highest_rate is not None:
            axes.axvline(result.highest_rate, color=canvas.GREEN, linewidth=5, alpha=0.25)
    if result.highest_rate is None:
        note = "No rate that was tried met the limits."
    else:
        is_left = 2 * result.highest_rate < rates[0] + rates[-1]
        shares.annotate(
            f"{shown.rate(result.highest_rate)} requests/s",
            (result.highest_rate, 0.05),
            xytext=(6, 0) if is_left else (-6, 0),
            textcoords="offset points",
            ha="left" if is_left else "right",
            color=canvas.INK,
        )
        note = "The band marks the highest rate that met the limits."
    return Picture("frontier", title, f"{note} Filled points met them, hollow ones did not.{_of_means(limits)}", figure)


def _draw_points(axes: Axes, rates: Sequence[float], values: Sequence[float], are_met: Sequence[bool], colour: str) -> None:
    axes.plot(rates, values, color=colour, linewidth=1.2)
    for is_met, face in ((True, colour), (False, canvas.PAPER)):
        shown_here = [(rate, value) for rate, value, met in zip(rates, values, are_met, strict=True) if met is is_met]
        axes.plot(
            [rate for rate, _ in shown_here],
            [value for _, value in shown_here],
            "o",
            markersize=6,
            markerfacecolor=face,
            markeredgecolor=colour,
            markeredgewidth=1.4,
        )


def _draw_p99(
    axes: Axes,
    rates: Sequence[float],
    times: Sequence[Percentiles | None],
    are_met: Sequence[bool],
    colour: str,
    limit: float | None,
) -> None:
    """Rates at which nothing was completed have none."""
    known = [(rate, time.p99, met) for rate, time, met in zip(rates, times, are_met, strict=True) if time is not None]
    _draw_points(axes, [rate for rate, _, _ in known], [p99 for _, p99, _ in known], [met for _, _, met in known], colour)
    if limit is not None:
        axes.axhline(limit, color=canvas.INK, linestyle="--", linewidth=1)
    if scale := [*(p99 for _, p99, _ in known), *([] if limit is None else [limit])]:
        _scale_seconds(axes, "y", scale)
