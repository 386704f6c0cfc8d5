"""One style for all figures. A figure is drawn once: as a PNG for a page of text, and as SVG that stands in an HTML page and
takes its colours from that page's theme. matplotlib is an extra, and is used without pyplot, which would choose a backend
for the whole process."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ferrum_rt.interfaces.telemetry import Phase

# A colour's name → on paper, on a dark screen. The bright ones are Okabe and Ito's, which the colour-blind can tell apart.
PALETTE: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b2430", "#e6eaf0"),
    "muted": ("#5b6675", "#9aa5b4"),
    "grid": ("#e3e7ec", "#2c3542"),
    "paper": ("#ffffff", "#171c24"),
    "grey": ("#a3adba", "#77828f"),
    "orange": ("#e69f00", "#f0b338"),
    "blue": ("#0072b2", "#3f9fdc"),
    "sky": ("#8cc8ec", "#2b668c"),
    "purple": ("#cc79a7", "#dd9abf"),
    "red": ("#d55e00", "#f07a2b"),
    "green": ("#009e73", "#2fbf96"),
}
INK, MUTED, GRID, PAPER, GREY, ORANGE, BLUE, SKY, PURPLE, RED, GREEN = (light for light, _ in PALETTE.values())

PHASES: Mapping[Phase, str] = {
    Phase.QUEUE: GREY,
    Phase.PREFILL: ORANGE,
    Phase.DECODE: BLUE,
    Phase.PARKED: PURPLE,
    Phase.PREEMPTED: RED,
}

WIDTH = 10.0  # inches
_DPI = 200

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 8,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.5,
    "lines.dash_capstyle": "butt",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "ferrum_rt",
}


def style() -> AbstractContextManager[None]:
    """Of everything that is drawn inside."""
    return matplotlib.rc_context(_STYLE)


def blank(height: float) -> Figure:
    """So many inches high."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def save_png(figure: Figure, path: Path) -> None:
    """Twice as fine as a page shows it."""
    with style():
        figure.savefig(path, format="png", dpi=_DPI)


def as_svg(figure: Figure, name: str, label: str, tips: Sequence[str] = ()) -> str:
    """To stand in an HTML page whose style defines each colour of the palette as ``--NAME``. Ids begin with ``name``, so
    those of other figures are others. The artist with the gid ``tip-3`` tells the fourth of ``tips`` to who points at it."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", facecolor="none", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    begin = svg.index("<svg")
    view = svg.split('viewBox="', 1)[1].split('"', 1)[0]
    body = svg[svg.index(">", begin) + 1 :]
    for pattern, replacement in _CUTS:
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    for before in (' id="', "url(#", 'href="#'):
        body = body.replace(before, f"{before}{name}-")
    for colour, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{colour})")
    # Last, for a tip may quote anything.
    body = re.sub(rf'<g id="{name}-tip-(\d+)">', lambda tip: f"<g><title>{html.escape(tips[int(tip[1])])}</title>", body)
    return f'<svg viewBox="{view}" role="img" aria-label="{html.escape(label)}">{body}'


def _rounded(path: re.Match[str]) -> str:
    """A hundredth of a point is enough."""
    short = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), path[0])
    return " ".join(short.split())


# Patterns in what matplotlib writes, and what takes their place, in this order.
_CUTS: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = (
    (r"<defs>\s*<style.*?</style>\s*</defs>", ""),  # it would hold for the whole page
    (r"font-family: .*?sans-serif(; )?", ""),  # the page's own
    (r'(?<= d=")[^"]*', _rounded),
    (r"xlink:href", "href"),
    (r"\n\s*", "\n"),
)
