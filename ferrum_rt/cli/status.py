"""ferrum-rt status: how a daemon is doing."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec

import ferrum_rt
from ferrum_rt.cli.output import one_line
from ferrum_rt.interfaces.errors import ConnectionLost
from ferrum_rt.interfaces.types import EngineMetrics, EngineStatus, HealthStatus, to_builtins
from ferrum_rt.ipc.address import socket_path

LIMIT_S = 10.0
_MIB = 2**20


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon says of its engine; ``metrics`` are a little older than ``status``."""

    status: EngineStatus
    health: HealthStatus
    metrics: EngineMetrics


def status(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if the daemon is not healthy, which an engine is only while it takes requests."""
    report = anyio.run(_ask, socket_path(arguments.socket), backend_options={"use_uvloop": True})
    print(msgspec.json.encode(report).decode() if arguments.json else _as_text(report))
    return 0 if report.health.healthy else 1


async def _ask(path: Path) -> Report:
    try:
        with anyio.fail_after(LIMIT_S):
            async with ferrum_rt.connect(path) as engine:
                status, health = await engine.status(), await engine.health_check()
                return Report(status=status, health=health, metrics=engine.metrics())
    except TimeoutError as error:
        raise ConnectionLost(f"{path}: the daemon did not answer within {LIMIT_S:g} s") from error


def _as_text(report: Report) -> str:
    return "\n".join(f"{name:<18}{value}" for name, value in _lines(report))


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    status, metrics = report.status, report.metrics
    model, memory, tokens = status.model, status.memory, metrics.scheduler
    yield "state", status.state.value
    yield "model", "none" if model is None else f"{model.id} ({model.type.value}, {model.dtype.value}, {model.device.value})"
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
