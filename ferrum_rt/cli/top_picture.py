"""What ferrum-rt top shows of a daemon: two of its reports to lines of text, and nothing else."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from ferrum_rt.cli.output import described_model
from ferrum_rt.interfaces.types import ClientDiagnostics, ClientId, EngineMetrics, EngineStatus, SchedulerDiagnostics

_LABEL = 11
_NUMBERS = ("live", "running", "waiting", "pages", "tokens/s")
_COLUMN = 10  # of the table, but for the first
_LEAST_NAME = 8
_UNKNOWN = "-"
_UNTOLD = "clients: only the user who runs the daemon is told of them"
_OUTCOMES: Mapping[str, Callable[["Look"], float]] = {
    "finished": lambda look: look.status.requests.finished,
    "failed": lambda look: look.status.requests.failed,
    "cancelled": lambda look: look.status.requests.cancelled,
    "rejected": lambda look: look.status.requests.rejected,
}


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon says of itself at one moment; ``diagnostics`` is None for who is not its own user."""

    status: EngineStatus
    metrics: EngineMetrics
    diagnostics: SchedulerDiagnostics | None


def picture(before: Look | None, now: Look, *, width: int, height: int | None = None) -> list[str]:
    """Lines of at most ``width`` columns, at most ``height`` of them. Rates are those between the two looks; without the
    first there are none."""
    since = _Since(before, now)
    lines = [*_engine(since, width), ""]
    if now.diagnostics is None:
        lines.append(_UNTOLD)
    else:
        room = None if height is None else height - len(lines)
        lines += _table(since, now.diagnostics, width, room)
    return [_fitted(line, width) for line in lines[:height]]


class _Since:
    """What has happened from the one look to the other; None where there is only one."""

    def __init__(self, before: Look | None, now: Look) -> None:
        self.before, self.now = before, now
        # By the daemon's clock: when the reports came says less about when they were made.
        self.elapsed_s = 0.0 if before is None else now.status.uptime_s - before.status.uptime_s

    def grown(self, counter: Callable[[Look], float]) -> float | None:
        """By how much."""
        if self.before is None or self.elapsed_s <= 0:
            return None
        return counter(self.now) - counter(self.before)

    def rate(self, counter: Callable[[Look], float]) -> float | None:
        """Per second."""
        grown = self.grown(counter)
        return None if grown is None else grown / self.elapsed_s

    def generated(self, client_id: ClientId, client: ClientDiagnostics) -> float | None:
        """A client's tokens, per second: at least. One that had nothing under way in between is counted anew, and what it
        got before that is not known any more."""
        if self.before is None or self.before.diagnostics is None or self.elapsed_s <= 0:
            return None
        known = self.before.diagnostics.clients.get(client_id)
        old = 0 if known is None or known.generated_tokens > client.generated_tokens else known.generated_tokens
        return (client.generated_tokens - old) / self.elapsed_s


def _engine(since: _Since, width: int) -> Iterator[str]:
    status, metrics = since.now.status, since.now.metrics
    requests, scheduler, model = status.requests, metrics.scheduler, status.model
    name = "no model" if model is None else described_model(model)
    yield f"ferrum-rt top   {name}   {status.state.value}   up {_duration(status.uptime_s)}"
    yield ""
    yield _labelled("requests", f"running {requests.running}, waiting {requests.waiting}, parked {requests.parked}")
    yield _labelled("ended", ", ".join(f"{outcome} {_rate(since.rate(read))}" for outcome, read in _OUTCOMES.items()))
    yield from _pages(since.now, width)
    tokens_in = _rate(since.rate(lambda look: look.metrics.scheduler.prompt_tokens))
    tokens_out = _rate(since.rate(lambda look: look.metrics.scheduler.generated_tokens))
    hits = scheduler.cached_tokens / max(1, scheduler.prompt_tokens)
    yield _labelled("tokens", f"in {tokens_in}, out {tokens_out}, prefix hits {hits:.0%} since the start")
    preemptions = _rate(since.rate(lambda look: look.metrics.scheduler.preemptions))
    yield _labelled("preempted", f"{preemptions}, {scheduler.preemptions} since the start")
    yield _labelled("steps", _steps(since))
    lag = since.rate(lambda look: look.metrics.loop_lag_s)
    late = _UNKNOWN if lag is None else f"{1e3 * lag:.1f} ms/s"
    yield _labelled("loop lag", f"{late}, the longest {1e3 * metrics.max_loop_lag_s:.1f} ms")


def _steps(since: _Since) -> str:
    """How many, what each takes in the executor, and what the host adds."""
    count, rate = since.grown(lambda look: look.metrics.steps), since.rate(lambda look: look.metrics.steps)
    step_s, host_s = since.grown(lambda look: look.metrics.step_s), since.grown(lambda look: look.metrics.host_s)
    share = since.rate(lambda look: look.metrics.host_s)
    of_time = "" if share is None else f", {share:.1%} of the time"
    return f"{_rate(rate)}, {_each(step_s, count)} each, host {_each(host_s, count)} each{of_time}"


def _pages(now: Look, width: int) -> Iterator[str]:
    """Counts, and a bar as long as there is room: active, then cached, then free ones."""
    pages = now.status.pages
    counts = f"active {pages.active}, cached {pages.cached}, free {pages.free} of {pages.total}"
    yield _labelled("pages", counts)
    length = width - _LABEL - 2
    if length > 0:
        ends = [round(length * count / max(1, pages.total)) for count in (pages.active, pages.active + pages.cached)]
        if pages.active:
            ends = [max(1, ends[0]), max(1, *ends)]
        bar = "#" * ends[0] + "=" * (ends[1] - ends[0])
        yield _labelled("", f"[{bar.ljust(length, '.')}]")


def _table(since: _Since, diagnostics: SchedulerDiagnostics, width: int, room: int | None) -> Iterator[str]:
    """The busiest first: who gets the most tokens, then who has the most under way. What does not fit is counted."""
    found = [(client_id, client, since.generated(client_id, client)) for client_id, client in diagnostics.clients.items()]
    found.sort(key=lambda one: (-(one[2] or 0.0), -one[1].num_running, -one[1].num_live, one[0]))
    name_width = max(_LEAST_NAME, width - _COLUMN * len(_NUMBERS))
    yield _row("client", _NUMBERS, name_width)
    num_shown = len(found) if room is None or len(found) < room else max(0, room - 2)
    for client_id, client, rate in found[:num_shown]:
        counts = (client.num_live, client.num_running, client.num_waiting, client.num_pages)
        yield _row(client_id, [*map(str, counts), _UNKNOWN if rate is None else _number(rate)], name_width)
    if num_shown < len(found):
        yield f"and {len(found) - num_shown} more"


def _row(name: str, cells: Sequence[str], name_width: int) -> str:
    short = _fitted(name, name_width)
    return short + " " * (name_width - _columns(short)) + "".join(cell.rjust(_COLUMN) for cell in cells)


# -- numbers and text -----------------------------------------------------------------------------------------------------


def _labelled(label: str, text: str) -> str:
    return label.ljust(_LABEL) + text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _rate(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{_number(value)}/s"


def _each(seconds: float | None, count: float | None) -> str:
    """Of so many that took so long together."""
    return f"{1e3 * seconds / count:.2f} ms" if seconds is not None and count else _UNKNOWN


def _duration(seconds: float) -> str:
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _fitted(text: str, width: int) -> str:
    """The beginning of a text, as far as the columns go. What is no character to be seen, as that which turns the direction
    of writing, is a question mark: clients choose their names."""
    shown, used = "", 0
    for character in text:
        character = character if character.isprintable() else "?"
        used += _columns(character)
        if used > width:
            break
        shown += character
    return shown


def _columns(text: str) -> int:
    """That a terminal needs for it."""
    return sum(
        0 if unicodedata.category(character) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )
