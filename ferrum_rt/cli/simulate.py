"""ferrum-rt simulate: what an engine would make of a workload, in virtual time."""

import argparse
import math
from collections.abc import Iterator

import msgspec

from ferrum_rt.cli.options import UsageError, given_options, option_name
from ferrum_rt.cli.output import facts, table
from ferrum_rt.cli.simulate_options import DRAWN
from ferrum_rt.interfaces.config import EngineConfig, build_config, load_config
from ferrum_rt.interfaces.types import Arrival
from ferrum_rt.load.shown import seconds
from ferrum_rt.runtime.simulation.capacity import simulate_capacity
from ferrum_rt.runtime.simulation.engine import StepCosts
from ferrum_rt.runtime.simulation.reports import CapacityReport, ClientReport, Level, Objectives, Percentiles
from ferrum_rt.runtime.simulation.workload import Arrivals, ClientShare, Sizes, Workload, read_trace

# An option → the part and the field of the configuration that it stands for.
_ENGINE = {
    "slots": ("scheduler", "max_running_requests"),
    "queue": ("scheduler", "max_waiting_requests"),
    "pages": ("kv_cache", "num_pages"),
    "block_size": ("kv_cache", "block_size"),
    "max_batched_tokens": ("batching", "max_batched_tokens"),
    "max_model_len": ("model", "max_model_len"),
}


def simulate(arguments: argparse.Namespace) -> int:
    """Print the report. Raises UsageError, and ConfigError."""
    if arguments.plot is not None:
        from ferrum_rt.cli.simulate_plot import check_plot  # it says at once what is missing

        check_plot(arguments.plot)
    config, costs = _engine(arguments), _costs(arguments)
    objectives = Objectives(ttft_s=_positive(arguments, "ttft_slo"), itl_s=_positive(arguments, "itl_slo"))
    if arguments.shared_prefix < 0:
        raise UsageError(f"argument --shared-prefix: must be at least 0, got {arguments.shared_prefix}")
    result = simulate_capacity(_arrivals(arguments), config, costs, objectives, shared_prefix=arguments.shared_prefix)
    if arguments.plot is not None:
        from ferrum_rt.cli.simulate_plot import plot

        plot(result, arguments.plot)
    print(msgspec.json.encode(result.report).decode() if arguments.json else _as_text(result.report))
    return 0


def _arrivals(arguments: argparse.Namespace) -> list[Arrival]:
    given = given_options(arguments, DRAWN)
    if arguments.trace is not None:
        for name in given:
            raise UsageError(f"argument {option_name(name)}: not with --trace, which says what requests there are")
        return read_trace(arguments.trace)
    for name in ("requests", "deadline"):
        if name in given:
            _positive(arguments, name)
    drawn = argparse.Namespace(**DRAWN | given)
    workload = Workload(
        arrivals=Arrivals(
            kind=drawn.arrivals,
            rate=drawn.rate,
            burstiness=drawn.burstiness,
            period_s=drawn.period,
            amplitude=drawn.amplitude,
        ),
        prompt=Sizes.parse(drawn.prompt_tokens),
        output=Sizes.parse(drawn.output_tokens),
        clients=[ClientShare.parse(text) for text in drawn.client or ()] or [ClientShare()],
        deadline_s=drawn.deadline,
    )
    return workload.draw(drawn.requests, drawn.seed)


def _engine(arguments: argparse.Namespace) -> EngineConfig:
    fields: dict[str, dict[str, int]] = {}
    for name, (part, field) in _ENGINE.items():
        if (value := getattr(arguments, name)) is not None:
            fields.setdefault(part, {})[field] = value
    base = None if arguments.config is None else load_config(arguments.config)
    max_model_len = fields.pop("model", {}).get("max_model_len")
    return build_config(None, base, fields if max_model_len is None else {**fields, "max_model_len": max_model_len})


def _costs(arguments: argparse.Namespace) -> StepCosts:
    values = (arguments.step_ms, arguments.token_us, arguments.sequence_us, arguments.context_ns)
    if not all(0 <= value < math.inf for value in values) or not any(values):
        raise UsageError("--step-ms, --token-us, --sequence-us and --context-ns: must be at least 0, one of them more")
    return StepCosts(
        base_s=arguments.step_ms / 1e3,
        token_s=arguments.token_us / 1e6,
        sequence_s=arguments.sequence_us / 1e6,
        context_s=arguments.context_ns / 1e9,
    )


def _positive(arguments: argparse.Namespace, name: str) -> float:
    value: float = getattr(arguments, name)
    if not value > 0:
        raise UsageError(f"argument {option_name(name)}: must be more than 0, got {value:g}")
    return value


# -- the report -----------------------------------------------------------------------------------------------------------


def _as_text(report: CapacityReport) -> str:
    clients = report.clients if len(report.clients) > 1 else []
    header = (
        "client",
        "requests",
        "finished",
        "tokens",
        "share",
        "TTFT p50",
        "p90",
        "p99",
        "ITL p50",
        "p90",
        "p99",
        "in SLO",
    )
    return f"{facts(_facts(report))}\n\n{table(header, [_row(client) for client in (*clients, report.total)])}"


def _facts(report: CapacityReport) -> Iterator[tuple[str, str]]:
    engine, objectives = report.engine, report.objectives
    yield (
        "engine",
        f"{engine.slots} slots, {engine.pages} pages of {engine.block_size}, {engine.max_batched_tokens} tokens a step",
    )
    yield "requests", f"{report.requests}: finished {report.finished}, refused {report.refused}, late {report.late}"
    yield "time", f"{report.seconds:.1f} s, {report.steps} steps, busy {report.busy:.1%}"
    yield "tokens", f"prompt {report.prompt_tokens}, cached {report.cached_tokens}, output {report.output_tokens}"
    yield "output tokens/s", f"{report.output_tokens_per_s:.1f}"
    yield "waiting", _level(report.waiting)
    yield "running", f"{_level(report.running)}, of {engine.slots}"
    yield "pages", f"{_level(report.pages)}, of {engine.pages}"
    yield "preemptions", str(report.preemptions)
    yield "SLO", f"TTFT {_bound(objectives.ttft_s)}, ITL {_bound(objectives.itl_s)}"


def _level(level: Level) -> str:
    return f"mean {level.mean:.1f}, most {level.most}"


def _bound(seconds: float) -> str:
    return "any" if seconds == math.inf else f"{seconds:g} s"


def _row(client: ClientReport) -> list[str]:
    return [
        client.client,
        str(client.requests),
        str(client.finished),
        str(client.output_tokens),
        f"{client.share:.1%}",
        *_percentiles(client.ttft_s),
        *_percentiles(client.itl_s),
        f"{client.attainment:.1%}",
    ]


def _percentiles(found: Percentiles) -> list[str]:
    return [seconds(found.p50), seconds(found.p90), seconds(found.p99)]
