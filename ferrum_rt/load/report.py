"""A load test as one HTML page that needs nothing else: no network, no script, no font."""

import importlib.util
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.load import shown
from ferrum_rt.load.results import LoadResult, SweepResult

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_AS_TEXT = {kind.__name__: kind for kind in (shown.seconds, shown.rate, shown.share, shown.count, shown.plain)}


def write_report(result: LoadResult | SweepResult, path: Path) -> None:
    """Each number on it has its place in the result (``data-key``) and its exact value (``data-value``) beside what
    is shown. Raises ConfigError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a report's figures need matplotlib; install it with: pip install 'ferrum-rt[plot]'")
    path.write_text(_page(result), encoding="utf-8")


def _page(result: LoadResult | SweepResult) -> str:
    from ferrum_rt.load import canvas, figures  # matplotlib comes with them

    facts = _facts(result)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(show=_Numbers(facts).show, describe=_Numbers(facts).describe)
    drawn = [
        (one.title, one.note, one.figure and Markup(canvas.as_svg(one.figure, one.name, one.title, one.tips)))
        for one in figures.pictures(result)
    ]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        result=result,
        is_sweep=isinstance(result, SweepResult),
        began=_began(result),
        by_rate=_by_rate(result),
        best=_best(result),
        drawn=drawn,
        palette=canvas.PALETTE,
        # In a script element nothing is escaped, and nothing but "<" could end it.
        facts=Markup(msgspec.json.encode(facts).decode().replace("<", "\\u003c")),
    )


def _facts(result: LoadResult | SweepResult) -> dict[str, Any]:
    """The result as its file has it, but without what was recorded of single requests."""
    if isinstance(result, SweepResult):
        facts: dict[str, Any] = msgspec.to_builtins(result)
    else:
        facts = msgspec.to_builtins(msgspec.structs.replace(result, repeats=()))
        facts["repeats"] = [{"began_ns": one.began_ns, "duration_s": one.duration_s} for one in result.repeats]
    return facts


def _began(result: LoadResult | SweepResult) -> str | None:
    if isinstance(result, SweepResult):
        return None
    return f"{datetime.fromtimestamp(result.repeats[0].began_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _by_rate(result: LoadResult | SweepResult) -> Sequence[int]:
    """A sweep's points, as indices, in the order of their rates."""
    if not isinstance(result, SweepResult):
        return ()
    return sorted(range(len(result.points)), key=lambda index: result.points[index].rate)


def _best(result: LoadResult | SweepResult) -> int | None:
    """The index of the point with a sweep's highest rate."""
    if not isinstance(result, SweepResult):
        return None
    return next((index for index, one in enumerate(result.points) if one.is_met and one.rate == result.highest_rate), None)


class _Numbers:
    """Of ``facts``, as HTML."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts

    def show(self, kind: str, *path: str | int) -> Markup:
        """The number at this place, or a dash."""
        value = self._at(path)
        if value is None:
            return Markup("&ndash;")
        return Markup('<data value="{exact}" data-key="{key}" data-value="{exact}">{text}</data>').format(
            key=".".join(map(str, path)), exact=msgspec.json.encode(value).decode(), text=_AS_TEXT[kind](value)
        )

    def describe(self, *path: str | int) -> Markup:
        """Whatever is at this place."""
        value = self._at(path)
        match value:
            case bool():
                return Markup("yes" if value else "no")
            case int() | float() | None:
                return self.show("plain", *path)
            case dict():
                return Markup(", ").join(escape(key) + " " + self.describe(*path, key) for key in value)
            case list() | tuple():
                return Markup(", ").join(self.describe(*path, index) for index in range(len(value)))
            case _:
                return escape(value)

    def _at(self, path: Sequence[str | int]) -> Any:
        value: Any = self._facts
        for part in path:
            value = value[part]
        return value
