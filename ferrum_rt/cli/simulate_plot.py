"""The picture of a simulated workload. matplotlib is an extra, loaded only here."""

import importlib.util
import io
from pathlib import Path
from typing import Any

from ferrum_rt.cli.options import UsageError
from ferrum_rt.runtime.simulation.reports import CapacityReport, Result, Series

FORMATS = (".png", ".svg", ".pdf", ".html")
_ORANGE, _GREY, _BLUE = "#c2410c", "#64748b", "#1d4ed8"


def check_plot(path: Path) -> None:
    """Raises UsageError if no picture could be drawn there."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"argument --plot: {path}: the name must end in one of {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("argument --plot: needs matplotlib; install it with: pip install 'ferrum-rt[plot]'")


def plot(result: Result, path: Path) -> None:
    """Four panels: requests and pages over time, percentiles of TTFT and ITL, and SLO attainment per client."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for the whole process

    figure = Figure(figsize=(11, 7), layout="constrained")
    ((requests, pages), (latency, clients)) = figure.subplots(2, 2)
    _draw_requests(requests, result.series)
    _draw_pages(pages, result)
    _draw_latency(latency, result)
    _draw_clients(clients, result.report)
    for axes in (requests, pages, latency, clients):
        axes.spines[["top", "right"]].set_visible(False)
    if path.suffix.lower() == ".html":
        text = io.StringIO()
        figure.savefig(text, format="svg")
        svg = text.getvalue()
        page = f'<!doctype html>\n<meta charset="utf-8">\n<title>ferrum-rt simulate</title>\n{svg[svg.index("<svg") :]}'
        path.write_text(page, encoding="utf-8")
    else:
        figure.savefig(path, dpi=130)


def _draw_requests(axes: Any, series: Series) -> None:
    timeline = series.timeline
    axes.plot(timeline.moments, timeline.columns["waiting"], label="waiting", color=_ORANGE, linewidth=1)
    axes.plot(timeline.moments, timeline.columns["running"], label="running", color=_BLUE, linewidth=1)
    axes.set(title="requests", xlabel="seconds")
    axes.legend(frameon=False)


def _draw_pages(axes: Any, result: Result) -> None:
    timeline, total = result.series.timeline, result.report.engine.pages
    axes.plot(timeline.moments, timeline.columns["pages"], color=_BLUE, linewidth=1)
    axes.set(
        title=f"active pages, of {total}", xlabel="seconds", ylim=(0, max(timeline.columns["pages"], default=0) * 1.1 + 1)
    )
    if result.report.pages.most * 2 > total:
        axes.set_ylim(0, total * 1.05)
        axes.axhline(total, color=_GREY, linewidth=1, linestyle="--")


def _draw_latency(axes: Any, result: Result) -> None:
    objectives = result.report.objectives
    for name, values, bound, colour in (
        ("TTFT", result.series.ttft_s, objectives.ttft_s, _ORANGE),
        ("ITL", result.series.itl_s, objectives.itl_s, _BLUE),
    ):
        if values:
            axes.plot(range(len(values)), values, label=name, color=colour)
            axes.set_yscale("log")
        if bound != float("inf"):
            axes.axhline(bound, color=colour, linewidth=1, linestyle="--", label=f"{name} SLO")
    axes.set(title="latency in seconds", xlabel="percentile")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)


def _draw_clients(axes: Any, report: CapacityReport) -> None:
    names = [client.client for client in report.clients]
    bars = axes.barh(names, [100 * client.attainment for client in report.clients], color=_GREY)
    axes.bar_label(bars, fmt="%.1f %%", padding=2)
    axes.set(title="requests within the SLO, per client", xlabel="percent", xlim=(0, 115))
    axes.invert_yaxis()
