"""Metrics, through OpenTelemetry's API: three histograms by the conventions for generative AI, recorded at a request's end,
and what engines count anyway, read when somebody collects. In a process without an SDK nobody does."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol
from weakref import WeakKeyDictionary

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.types import EngineMetrics, ModelId
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.tracing import operation_of

_log = logging.getLogger("ferrum_rt")
_METER = metrics.get_meter(names.SCOPE)
_DURATION = _METER.create_histogram(
    names.REQUEST_DURATION,
    unit="s",
    description="From a request's admission to its end.",
    explicit_bucket_boundaries_advisory=names.DURATION_BOUNDS,
)
_FIRST_TOKEN = _METER.create_histogram(
    names.TIME_TO_FIRST_TOKEN,
    unit="s",
    description="From a request's admission to its first token.",
    explicit_bucket_boundaries_advisory=names.FIRST_TOKEN_BOUNDS,
)
_PER_TOKEN = _METER.create_histogram(
    names.TIME_PER_OUTPUT_TOKEN,
    unit="s",
    description="Of a request's tokens after the first, on average.",
    explicit_bucket_boundaries_advisory=names.PER_TOKEN_BOUNDS,
)


class Observed(Protocol):
    """An engine, as a collector sees it; from any thread."""

    def metrics(self) -> EngineMetrics: ...

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Requests that have ended, or were refused, by how."""
        ...


def record(generation: Generation, model: ModelId) -> None:
    """At a request's end."""
    attributes = {
        names.OPERATION_NAME: operation_of(generation.request),
        names.PROVIDER_NAME: names.PROVIDER,
        names.REQUEST_MODEL: model,
    }
    if (error := generation.error_type) is not None:
        attributes[names.ERROR_TYPE] = error
    first, last = generation.first_token_at, generation.finished_at
    assert last is not None  # it has ended
    try:
        _DURATION.record(last - generation.submitted_at, attributes)
        if first is not None:
            _FIRST_TOKEN.record(first - generation.submitted_at, attributes)
            if generation.num_output_tokens > 1:
                _PER_TOKEN.record((last - first) / (generation.num_output_tokens - 1), attributes)
    except Exception as fault:  # the host's SDK is no request's trouble
        _log.warning("a request's metrics could not be recorded: %s", type(fault).__name__)


# -- what engines count ---------------------------------------------------------------------------------------------------

_numbers = itertools.count(1)
_engines: WeakKeyDictionary[Observed, dict[str, str | int]] = WeakKeyDictionary()
_Reading = Callable[[EngineMetrics, Mapping[str, int]], Iterable[tuple[float, Mapping[str, str]]]]


def watch(engine: Observed, model: ModelId) -> None:
    """Its counts are to be read for as long as it is referred to."""
    _engines[engine] = {names.ENGINE: next(_numbers), names.REQUEST_MODEL: model}


def _callback(read: _Reading) -> Callable[[CallbackOptions], Iterator[Observation]]:
    """In whatever thread collects."""

    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for engine, attributes in list(_engines.items()):
            for value, more in read(engine.metrics(), engine.outcomes):
                yield Observation(value, {**attributes, **more})

    return observe


def _one(read: Callable[[EngineMetrics], float]) -> _Reading:
    return lambda found, _: [(read(found), {})]


def _requests(found: EngineMetrics, _: Mapping[str, int]) -> Iterable[tuple[float, Mapping[str, str]]]:
    stats = found.scheduler
    counts = {"running": stats.running, "waiting": stats.waiting, "parked": stats.parked}
    return [(count, {names.STATE: state}) for state, count in counts.items()]


def _pages(found: EngineMetrics, _: Mapping[str, int]) -> Iterable[tuple[float, Mapping[str, str]]]:
    pages = found.scheduler.pages
    counts = {"free": pages.free, "active": pages.active, "cached": pages.cached}
    return [(count, {names.STATE: state}) for state, count in counts.items()]


def _ended(_: EngineMetrics, outcomes: Mapping[str, int]) -> Iterable[tuple[float, Mapping[str, str]]]:
    return [(count, {names.OUTCOME: outcome}) for outcome, count in outcomes.items()]


def _hit_rate(found: EngineMetrics) -> float:
    return found.scheduler.cached_tokens / max(1, found.scheduler.prompt_tokens)


_UP_DOWN: Mapping[str, tuple[str, str, _Reading]] = {
    names.REQUESTS: ("{request}", "Requests under way.", _requests),
    names.PAGES: ("{page}", "Pages of keys and values.", _pages),
}
_COUNTERS: Mapping[str, tuple[str, str, _Reading]] = {
    names.REQUESTS_ENDED: ("{request}", "Requests that ended, or were rejected.", _ended),
    names.PREEMPTIONS: (
        "{preemption}",
        "How often a sequence lost its slot to others.",
        _one(lambda found: found.scheduler.preemptions),
    ),
    names.PROMPT_TOKENS: ("{token}", "Tokens of prompts.", _one(lambda found: found.scheduler.prompt_tokens)),
    names.PROMPT_TOKENS_CACHED: (
        "{token}",
        "Those of them that were computed before.",
        _one(lambda found: found.scheduler.cached_tokens),
    ),
    names.GENERATED_TOKENS: ("{token}", "Tokens generated.", _one(lambda found: found.scheduler.generated_tokens)),
    names.STEPS: ("{step}", "Steps of the engine.", _one(lambda found: found.steps)),
    names.STEP_TIME: ("s", "Time in which the executor had a step.", _one(lambda found: found.step_s)),
    names.HOST_TIME: ("s", "Time that planning and committing took.", _one(lambda found: found.host_s)),
    names.LOOP_LAG: ("s", "Time for which the event loop kept the engine waiting.", _one(lambda found: found.loop_lag_s)),
}
_GAUGES: Mapping[str, tuple[str, str, _Reading]] = {
    names.PREFIX_HIT_RATE: ("1", "Share of prompts' tokens that were computed before.", _one(_hit_rate)),
    names.LONGEST_LOOP_LAG: ("s", "The longest of these times.", _one(lambda found: found.max_loop_lag_s)),
}

for _create, _described in (
    (_METER.create_observable_up_down_counter, _UP_DOWN),
    (_METER.create_observable_counter, _COUNTERS),
    (_METER.create_observable_gauge, _GAUGES),
):
    for _name, (_unit, _description, _read) in _described.items():
        _create(_name, [_callback(_read)], unit=_unit, description=_description)
