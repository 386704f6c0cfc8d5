"""ferrum-rt status: how a daemon is doing, and what requests it has had."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import msgspec

import ferrum_rt
from ferrum_rt.cli.options import UsageError
from ferrum_rt.cli.output import described_model, facts, one_line
from ferrum_rt.interfaces.errors import NotFound
from ferrum_rt.interfaces.types import Arrival, EngineMetrics, EngineStatus, HealthStatus, to_builtins
from ferrum_rt.ipc.address import socket_path
from ferrum_rt.ipc.connection import answer_within

LIMIT_S = 10.0
_MIB = 2**20


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon says of its engine; ``metrics`` are a little older than ``status``."""

    status: EngineStatus
    health: HealthStatus
    metrics: EngineMetrics


def status(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if the daemon is not healthy, which an engine is only while it takes requests. Or write the trace
    that was asked for."""
    path, wants_arrivals = socket_path(arguments.socket), arguments.arrivals is not None
    found = anyio.run(_ask, path, wants_arrivals, backend_options={"use_uvloop": True})
    if not isinstance(found, Report):
        _write(found, arguments.arrivals)
        return 0
    print(msgspec.json.encode(found).decode() if arguments.json else facts(_facts(found)))
    return 0 if found.health.healthy else 1


async def _ask(path: Path, wants_arrivals: bool) -> Report | list[Arrival]:
    with answer_within(LIMIT_S, path):
        async with ferrum_rt.connect(path) as engine:
            if wants_arrivals:
                return await engine.fetch_arrivals()
            status, health = await engine.status(), await engine.health_check()
            return Report(status=status, health=health, metrics=engine.metrics())


def _write(arrivals: Sequence[Arrival], place: str) -> None:
    """As ``ferrum-rt simulate --trace`` reads them: one JSON object a line. Raises NotFound where there are none."""
    if not arrivals:
        raise NotFound("--arrivals: none of the daemon's requests has ended yet, so there is nothing to write")
    trace = "".join(f"{msgspec.json.encode(arrival).decode()}\n" for arrival in arrivals)
    if place == "-":
        print(trace, end="")
        return
    try:
        Path(place).write_text(trace, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"argument --arrivals: {place}: cannot be written: {error.strerror}") from error


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    status, metrics = report.status, report.metrics
    model, memory, tokens = status.model, status.memory, metrics.scheduler
    yield "state", status.state.value
    yield "model", "none" if model is None else described_model(model)
    yield "uptime", f"{status.uptime_s:.1f} s"
    yield "requests", _counts(status.requests)
    yield "pages", _counts(status.pages)
    yield "memory", f"weights {memory.weights / _MIB:.1f} MiB, KV cache {memory.kv_cache / _MIB:.1f} MiB"
    yield "steps", f"{metrics.steps}, executor {metrics.step_s:.1f} s, host {metrics.host_s:.1f} s"
    yield "tokens", f"prompt {tokens.prompt_tokens}, cached {tokens.cached_tokens}, generated {tokens.generated_tokens}"
    for name, health in report.health.status.components.items():
        yield name, "ok" if health.healthy else f"not healthy: {one_line(health.detail)}"


def _counts(counts: msgspec.Struct) -> str:
    return ", ".join(f"{name} {count}" for name, count in to_builtins(counts).items())
