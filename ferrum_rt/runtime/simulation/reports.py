"""The figures of a simulated workload."""

import math
from array import array
from collections.abc import Iterable
from typing import Literal

import msgspec

from ferrum_rt.interfaces.types import ClientId, SchedulerStats

MAX_POINTS = 2000
Column = Literal["waiting", "running", "pages"]


class Objectives(msgspec.Struct, frozen=True, kw_only=True):
    """What a request should get, in seconds: its first token within ``ttft_s`` of its arrival, the others ``itl_s`` apart on
    average."""

    ttft_s: float = math.inf
    itl_s: float = math.inf


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of one quantity; all NaN if there is none of it."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        known = sorted(values)
        if not known:
            return cls(mean=math.nan, p50=math.nan, p90=math.nan, p99=math.nan)
        p50, p90, p99 = (quantile(known, share) for share in (0.5, 0.9, 0.99))
        return cls(mean=math.fsum(known) / len(known), p50=p50, p90=p90, p99=p99)


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """Of a number that changes: its mean over time, and the highest."""

    mean: float
    most: int


class EngineSize(msgspec.Struct, frozen=True, kw_only=True):
    """The engine that was simulated."""

    slots: int
    pages: int
    block_size: int
    max_batched_tokens: int
    max_model_len: int


class ClientReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one client got. ``share`` is that of all output tokens, ``attainment`` the share of its requests that met the
    objectives."""

    client: ClientId
    requests: int
    finished: int
    output_tokens: int
    share: float
    ttft_s: Percentiles
    itl_s: Percentiles
    attainment: float


class CapacityReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a workload. Of the requests some finished, some were refused (the queue was full, or no engine of this
    size could hold them), and some were late: their deadline cut them short. ``busy`` is the share of time in which a
    step ran; ``cached_tokens`` of the prompts came from the prefix cache."""

    engine: EngineSize
    requests: int
    finished: int
    refused: int
    late: int
    seconds: float
    steps: int
    busy: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    preemptions: int
    waiting: Level
    running: Level
    pages: Level
    objectives: Objectives
    total: ClientReport
    clients: list[ClientReport]


class Timeline:
    """How many requests wait and run, and how many pages are active, over time. Of a long one only every second, fourth, …
    moment is kept, at most ``MAX_POINTS``; the levels are of all."""

    def __init__(self) -> None:
        self.moments = array("d")
        self.columns: dict[Column, array[int]] = {name: array("q") for name in ("waiting", "running", "pages")}
        self._sums = dict.fromkeys(self.columns, 0.0)
        self._most = dict.fromkeys(self.columns, 0)
        self._before = dict.fromkeys(self.columns, 0)
        self._now = 0.0
        self._stride, self._count = 1, 0

    def add(self, now: float, stats: SchedulerStats) -> None:
        values: dict[Column, int] = {"waiting": stats.waiting, "running": stats.running, "pages": stats.pages.active}
        elapsed, self._now = now - self._now, now
        for name, value in values.items():
            self._sums[name] += self._before[name] * elapsed
            self._most[name] = max(self._most[name], value)
        self._before = values
        if self._count % self._stride == 0:
            self.moments.append(now)
            for name, value in values.items():
                self.columns[name].append(value)
        self._count += 1
        if len(self.moments) > MAX_POINTS:
            self._thin_out()

    def level(self, name: Column) -> Level:
        return Level(mean=self._sums[name] / self._now if self._now else 0.0, most=self._most[name])

    def _thin_out(self) -> None:
        self._stride *= 2
        self.moments = self.moments[::2]
        self.columns = {name: values[::2] for name, values in self.columns.items()}


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """For a picture: the timeline, and of TTFT and inter-token latency the 0th to 100th percentile."""

    timeline: Timeline
    ttft_s: list[float]
    itl_s: list[float]


class Result(msgspec.Struct, frozen=True):
    report: CapacityReport
    series: Series


def quantile(known: list[float], share: float) -> float:
    """Of sorted values the one that ``share`` (0 to 1) of them do not exceed."""
    return known[max(0, math.ceil(share * len(known) - 1e-9) - 1)]  # 0.07 * 100 is a little more than 7


def curve(values: Iterable[float]) -> list[float]:
    """The 0th to 100th percentile; empty if there are no values."""
    known = sorted(values)
    return [quantile(known, percent / 100) for percent in range(101)] if known else []
