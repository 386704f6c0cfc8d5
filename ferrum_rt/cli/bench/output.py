"""What the load benches write to the terminal: a line while they run, and a table when they are done."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

from ferrum_rt.cli.output import facts, table
from ferrum_rt.load.results import Estimate, Limits, LoadResult, Percentiles, RequestRecord, Summary, SweepResult
from ferrum_rt.load.shown import seconds

_DRAW_EVERY_S = 0.1


class Progress:
    """A line on standard error that is drawn again as requests end, and is gone in the end; nothing where nobody can see
    it."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._what, self._total, self._ended, self._failed = "", 0, 0, 0
        self._began = self._drawn_at = -math.inf

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write("\r\033[K")

    def begin(self, what: str, total: int) -> None:
        """So many requests are to be sent."""
        self._what, self._total, self._ended, self._failed = what, total, 0, 0
        self._began = time.monotonic()
        self._draw(self._began)

    def ended(self, record: RequestRecord) -> None:
        self._ended += 1
        self._failed += record.error is not None
        now = time.monotonic()
        if now - self._drawn_at >= _DRAW_EVERY_S:
            self._draw(now)

    def _draw(self, now: float) -> None:
        self._drawn_at = now
        failed = f", {self._failed} failed" if self._failed else ""
        self._write(f"\r\033[K{self._what}: {self._ended}/{self._total} requests{failed}, {now - self._began:.0f} s")

    def _write(self, text: str) -> None:
        if self._is_shown:
            print(text, end="", file=sys.stderr, flush=True)


def load_as_text(result: LoadResult) -> str:
    """The facts, a line each, and a row of percentiles for each quantity."""
    return f"{facts(_load_facts(result))}\n\n{_percentiles_as_text(result.summary)}"


def sweep_as_text(result: SweepResult) -> str:
    """What was found, and a row for each rate that was tried, in the order of rates."""
    header = ("rate", "good", "", "requests/s", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "errors")
    rows = [
        [
            f"{point.rate:.3g}",
            f"{point.good_share:.1%}",
            "met" if point.is_met else "not met",
            f"{point.summary.request_rate.mean:.3g}",
            f"{point.summary.output_token_rate.mean:.1f}",
            *_two(point.summary.ttft_s),
            *_two(point.summary.itl_s),
            str(point.summary.requests - point.summary.completed),
        ]
        for point in sorted(result.points, key=lambda point: point.rate)
    ]
    return f"{facts(_sweep_facts(result))}\n\n{table(header, rows)}"


def _load_facts(result: LoadResult) -> Iterator[tuple[str, str]]:
    summary = result.summary
    yield "target", result.target
    yield "load", _named(result.load)
    yield "requests", ", ".join((f"{summary.requests}: completed {summary.completed}", *_errors(summary)))
    yield "time", " + ".join(f"{repeat.duration_s:.1f} s" for repeat in result.repeats)
    yield "requests/s", _estimate(summary.request_rate)
    if result.limits != Limits():
        yield "goodput", f"{_estimate(summary.goodput)} requests/s within {_limits(result.limits)}"
    yield "output tokens/s", _estimate(summary.output_token_rate)
    yield "all tokens/s", _estimate(summary.total_token_rate)
    if any(repeat.spans for repeat in result.repeats):
        count = sum(len(repeat.spans) for repeat in result.repeats)
        yield "spans", f"{count}, requests without {summary.spans_dropped}"


def _sweep_facts(result: SweepResult) -> Iterator[tuple[str, str]]:
    yield "target", result.target
    yield "load", _named(result.load)
    yield "wanted", f"{result.required_share:.0%} of the requests within {_limits(result.limits)}"
    found = result.highest_rate
    yield "highest rate", "none of those that were tried" if found is None else f"{found:.3g} requests/s"


def _percentiles_as_text(summary: Summary) -> str:
    rows = {
        "TTFT": summary.ttft_s,
        "ITL": summary.itl_s,
        "time per token": summary.tpot_s,
        "end to end": summary.e2e_s,
        "sent late by": summary.send_delay_s,
    }
    return table(("", "mean", "p50", "p90", "p95", "p99", "max"), [[name, *_all(found)] for name, found in rows.items()])


def _all(found: Percentiles | None) -> list[str]:
    if found is None:
        return ["-"] * 6
    return [seconds(value) for value in (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)]


def _two(found: Percentiles | None) -> list[str]:
    return ["-", "-"] if found is None else [seconds(found.p50), seconds(found.p99)]


def _errors(summary: Summary) -> list[str]:
    return [f"{code} {count}" for code, count in sorted(summary.errors.items())]


def _estimate(found: Estimate) -> str:
    return f"{found.mean:.4g}" if found.margin is None else f"{found.mean:.4g} ± {found.margin:.2g}"


def _limits(limits: Limits) -> str:
    named = (("TTFT", limits.ttft_s), ("ITL", limits.itl_s))
    return ", ".join(f"{name} {limit:g} s" for name, limit in named if limit is not None)


def _named(load: Mapping[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in load.items())
