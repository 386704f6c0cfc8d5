"""What do slow and dying clients of the daemon cost the others, and what do they leave behind?

One daemon, the real one over a fake executor that sleeps through its steps, and 1,000 streams over 200 connections. Eight
tenths of the connections are healthy; a tenth reads slowly or not at all, and a tenth is killed at random moments, again
and again (``bench/_load_clients.py``). Two phases take turns: *alone* has the healthy ones only, *together* has them all.
Asked are

- the time between two chunks of a healthy stream, as it is seen by the client: its p99 together over that alone, for each
  repeat. At most 1.5 is allowed, for the median of the repeats;
- the daemon's peak of memory, which must be below the bound that docs/architecture.md states, for limits as narrow as
  these clients allow;
- what is left when everybody has gone: threads, descriptors and active pages must be exactly what they were before anybody
  came, and the daemon must then end with status 0.

Where one of these does not hold, it says so in a line that begins with "violation", and ends with status 1.

    python -m bench.daemon_load [--connections 200] [--streams 5] [--repeats 5] [--seconds 8] [--step-ms 50]
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.abc
import msgspec
from anyio.streams.buffered import BufferedByteReceiveStream

import ferrum_rt
from bench._common import Spread, finish, machine, progress, spread, table
from bench._load_clients import OUTPUT_TOKENS, PROMPT_CHARACTERS
from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.interfaces.types import EngineMetrics, EngineStatus
from tests.fakes.daemon import daemon_process

P99_RATIO = 1.5
BLOCK_SIZE = 16
WAIT_S = 30.0
ALONE, TOGETHER = "alone", "together"


class Footprint(NamedTuple):
    """Of a process: what it has of the machine."""

    threads: int
    descriptors: int
    resident_mib: float
    peak_mib: float


class Times(NamedTuple):
    """Seconds: on a core, of the whole daemon and of its event loop's thread; and that thread's wait for a core, which is
    the machine's doing."""

    process: float
    loop: float
    waited: float


class Daemon:
    """The daemon's process, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process, self.path = process, path
        self._proc = Path(f"/proc/{process.pid}")

    def footprint(self) -> Footprint:
        status = dict(line.split(":", 1) for line in (self._proc / "status").read_text().splitlines())
        return Footprint(
            threads=int(status["Threads"]),
            descriptors=len(list((self._proc / "fd").iterdir())),
            resident_mib=int(status["VmRSS"].split()[0]) / 1024,
            peak_mib=int(status["VmHWM"].split()[0]) / 1024,
        )

    def forget_peak(self) -> None:
        (self._proc / "clear_refs").write_text("5")

    def times(self) -> Times:
        user_ticks, system_ticks = (self._proc / "stat").read_text().rpartition(") ")[2].split()[11:13]
        on_core, waited, _ = (self._proc / "task" / str(self.process.pid) / "schedstat").read_text().split()
        ticks = os.sysconf("SC_CLK_TCK")
        return Times((int(user_ticks) + int(system_ticks)) / ticks, int(on_core) / 1e9, int(waited) / 1e9)

    async def stop(self) -> int | None:
        """Its exit status, if it ends within ``WAIT_S``."""
        self.process.send_signal(signal.SIGTERM)
        await wait_for(lambda: self.process.poll() is not None)
        return self.process.returncode

    async def settled(self, same_as: Footprint | None = None) -> tuple[EngineStatus, Footprint]:
        """When no request is under way, no page is held and nobody is connected; or what there is after ``WAIT_S``. Then
        threads and descriptors are looked at until they are those of ``same_as``, or for as long again; without it, until
        they have stayed the same for a while: the daemon closes its end of our connection after we have closed ours."""
        async with ferrum_rt.connect(self.path) as engine:
            status = await engine.status()
            with anyio.move_on_after(WAIT_S):
                while under_way(status) or status.pages.active:
                    await anyio.sleep(0.05)
                    status = await engine.status()
        wanted = same_as or await self._unchanged()
        await wait_for(lambda: self.footprint()[:2] == wanted[:2])
        return status, self.footprint()

    async def _unchanged(self) -> Footprint:
        before = None
        while (now := self.footprint())[:2] != before:
            before = now[:2]
            await anyio.sleep(0.5)
        return now


def under_way(status: EngineStatus) -> int:
    return status.requests.running + status.requests.waiting + status.requests.parked


async def wait_for(condition: Callable[[], bool]) -> None:
    """Or for ``WAIT_S``, if it does not come to that."""
    with anyio.move_on_after(WAIT_S):
        while not condition():  # noqa: ASYNC110 - it is another process that has to come to it
            await anyio.sleep(0.05)


class Clients:
    """A process of clients of one kind, which obeys."""

    def __init__(self, process: anyio.abc.Process) -> None:
        assert process.stdin is not None  # both are pipes
        assert process.stdout is not None
        self._commands, self._answers = process.stdin, BufferedByteReceiveStream(process.stdout)

    async def tell(self, command: str) -> dict[str, Any]:
        await self._commands.send(f"{command}\n".encode())
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        with anyio.fail_after(WAIT_S):
            found: dict[str, Any] = json.loads(await self._answers.receive_until(b"\n", 65536))
        return found


@asynccontextmanager
async def clients(kind: str, path: Path, connections: int, streams: int) -> AsyncIterator[Clients]:
    command = [sys.executable, "-m", "bench._load_clients", kind, str(path), str(connections), str(streams)]
    async with await anyio.open_process(command, stderr=None) as process:
        try:
            group = Clients(process)
            await group.answer()
            yield group
        finally:
            process.kill()


class Phase(NamedTuple):
    """What was seen in one phase. Times are in milliseconds, those of a step except for the gaps between two chunks; shares
    are of a core. ``waited_share`` is the event loop's wait for a core."""

    p50: float
    p99: float
    p999: float
    longest: float
    steps_per_s: float
    executor: float
    scheduler: float
    loop_share: float
    waited_share: float
    daemon_share: float
    readers_share: float
    running: int
    parked: int
    peak_mib: float


@dataclass
class Load:
    """A running daemon with its clients."""

    args: argparse.Namespace
    daemon: Daemon
    groups: Mapping[str, Clients]
    engine: ferrum_rt.InferenceEngine
    phases: dict[str, list[Phase]] = field(default_factory=lambda: {ALONE: [], TOGETHER: []})
    counts: Counter[str] = field(default_factory=Counter)

    async def run_phase(self, kind: str) -> None:
        hostile = ("slow", "doomed") if kind == TOGETHER else ()
        for name in hostile:
            await self.groups[name].tell("begin")
        await anyio.sleep(self.args.settle)
        self.phases[kind].append(await self._measure())
        for name in hostile:
            self.counts.update(await self.groups[name].tell("end"))
        found = self.phases[kind][-1]
        progress(f"{kind}: p99 {found.p99:.1f} ms, {found.running} running, {found.parked} parked, {found.peak_mib:.0f} MiB")

    async def _measure(self) -> Phase:
        self.daemon.forget_peak()
        before, times, began = await self._metrics(), self.daemon.times(), anyio.current_time()
        await self.groups["healthy"].tell("begin")
        await anyio.sleep(self.args.seconds)
        seen = await self.groups["healthy"].tell("end")
        after, times_after, wall = await self._metrics(), self.daemon.times(), anyio.current_time() - began
        self.counts["num_failed"] += seen["num_failed"]
        steps = after.steps - before.steps
        return Phase(
            **{name: 1e3 * seen[name] for name in ("p50", "p99", "p999", "longest")},
            steps_per_s=steps / wall,
            executor=1e3 * (after.step_s - before.step_s) / steps,
            scheduler=1e3 * (after.host_s - before.host_s) / steps,
            loop_share=(times_after.loop - times.loop) / wall,
            waited_share=(times_after.waited - times.waited) / wall,
            daemon_share=(times_after.process - times.process) / wall,
            readers_share=seen["cpu_share"],
            running=after.scheduler.running,
            parked=after.scheduler.parked,
            peak_mib=self.daemon.footprint().peak_mib,
        )

    async def _metrics(self) -> EngineMetrics:
        self.engine.metrics()  # asks
        await self.engine.health_check()  # is answered behind that
        return self.engine.metrics()


class Found(NamedTuple):
    """Everything. ``rest`` is the daemon with all pages used and nobody there, ``left`` when all had gone."""

    phases: dict[str, list[Phase]]
    counts: Counter[str]
    rest: Footprint
    left: Footprint
    status: EngineStatus
    exit_status: int | None


async def measure(args: argparse.Namespace, directory: Path) -> Found:
    path, config_file = directory / "s", directory / "daemon.toml"
    limits = msgspec.to_builtins(daemon_limits(args))
    lines = ["[daemon]", 'log_level = "warning"', "[daemon.limits]", *(f"{key} = {value}" for key, value in limits.items())]
    config_file.write_text("\n".join(lines))
    config = engine_config(args)
    async with daemon_process(path, config=config, step_s=args.step_ms / 1e3, config_file=str(config_file)) as process:
        daemon = Daemon(process, path)
        await use_all_pages(path)
        _, rest = await daemon.settled()
        progress(f"at rest: {rest}")
        async with AsyncExitStack() as stack:
            groups = {}
            for kind, connections in shares(args.connections).items():
                groups[kind] = await stack.enter_async_context(clients(kind, path, connections, args.streams))
            load = Load(args, daemon, groups, await stack.enter_async_context(ferrum_rt.connect(path)))
            for repeat in range(args.repeats):
                for kind in (ALONE, TOGETHER) if repeat % 2 == 0 else (TOGETHER, ALONE):
                    await load.run_phase(kind)
        status, left = await daemon.settled(rest)
        progress(f"all have gone: {left}")
        return Found(load.phases, load.counts, rest, left, status, await daemon.stop())


async def use_all_pages(path: Path) -> None:
    """So that what it takes to keep the books of all of them is there from the start."""
    async with ferrum_rt.connect(path) as engine:
        pages = (await engine.status()).pages
        length = engine.config.model.max_model_len or 0
        num_prompts = 1 + BLOCK_SIZE * pages.total // (length - 1)
        prompts = [random.randbytes(length // 2).hex()[: length - 1] for _ in range(num_prompts)]
        await engine.infer_batch(prompts, max_tokens=1)


def shares(connections: int) -> dict[str, int]:
    tenth = connections // 10
    return {"healthy": connections - 2 * tenth, "slow": tenth, "doomed": tenth}


def engine_config(args: argparse.Namespace) -> dict[str, Any]:
    """Room for all streams at once, with what is left of the killed ones."""
    num_slots = args.connections * args.streams * 21 // 20
    max_model_len = PROMPT_CHARACTERS + OUTPUT_TOKENS[1]
    return {
        "scheduler": {"max_running_requests": num_slots},
        "batching": {"max_batched_tokens": 4 * num_slots},
        "kv_cache": {"block_size": BLOCK_SIZE, "num_pages": num_slots * -(-max_model_len // BLOCK_SIZE)},
        "max_model_len": max_model_len,
    }


def daemon_limits(args: argparse.Namespace) -> DaemonLimits:
    """No more than these clients may come to, for the bound on memory to say something."""
    num_requests = args.connections * args.streams * 21 // 20
    return DaemonLimits(
        frame_bytes=2**20,
        stall_s=args.stall,
        user_tokens=num_requests * (PROMPT_CHARACTERS + OUTPUT_TOKENS[1]),
        user_bytes=8 * 2**20,
    )


def memory_bound_mib(rest: Footprint, limits: DaemonLimits, connections: int, requests: int) -> float:
    """As docs/architecture.md has it, for one user."""
    of_user = 28 * limits.user_bytes + 80 * limits.user_tokens
    return rest.resident_mib + (of_user + 30 * limits.frame_bytes) / 2**20 + (80 * connections + 16 * requests) / 1024


def violations(found: Found, ratios: Sequence[float], bound_mib: float, *, is_smoke: bool) -> list[str]:
    """In words. A smoke run is too short for anybody to be cut off, or for the ratio to mean anything."""
    left, pages = found.left, found.status.pages
    ratio, peak = statistics.median(ratios), max(phase.peak_mib for phases in found.phases.values() for phase in phases)
    known = {
        f"{found.counts['num_failed']} healthy streams failed": found.counts["num_failed"] > 0,
        "nobody was killed": not found.counts["num_killed"],
        "nobody was reset": not found.counts["num_reset"],
        "nobody was cut off": not found.counts["num_cut"] and not is_smoke,
        f"{under_way(found.status)} requests are still under way": under_way(found.status) > 0,
        f"{pages.active} pages are still held": pages.active > 0,
        f"{left.threads} threads are left of {found.rest.threads}": left.threads != found.rest.threads,
        f"{left.descriptors} descriptors are left of {found.rest.descriptors}": left.descriptors != found.rest.descriptors,
        f"the daemon ended with status {found.exit_status}": found.exit_status != 0,
        f"the daemon had {peak:.0f} MiB, where {bound_mib:.0f} are the bound": peak > bound_mib,
        f"the healthy streams' p99 is {ratio:.2f} times that alone": ratio > P99_RATIO and not is_smoke,
    }
    return [text for text, is_broken in known.items() if is_broken]


def show(found: Found, ratios: Sequence[float], bound_mib: float) -> None:
    kinds = (ALONE, TOGETHER)
    spreads = {kind: {name: spread_of(found.phases[kind], name) for name in Phase._fields} for kind in kinds}
    print(f"Median (low to high) of {len(ratios)} phases of each kind; times in ms")
    labels = {
        "p50": "gap between chunks, p50",
        "p99": "p99",
        "p999": "p99.9",
        "longest": "longest",
        "steps_per_s": "steps per second",
        "executor": "executor, a step",
        "scheduler": "plan + commit, a step",
        "loop_share": "event loop, share of a core",
        "waited_share": "event loop waiting for a core",
        "daemon_share": "daemon, share of a core",
        "readers_share": "healthy readers, share of a core",
        "running": "streams running at the end",
        "parked": "streams parked at the end",
        "peak_mib": "daemon's peak, MiB",
    }
    print(
        table(
            ["", *kinds],
            [[text, *(spreads[kind][name].show(digits(name)) for kind in kinds)] for name, text in labels.items()],
        )
    )
    print(f"\np99 together / alone: {spread(ratios).show(2)}, at most {P99_RATIO} is allowed")
    print(f"killed: {found.counts['num_killed']}, reset: {found.counts['num_reset']}, cut off: {found.counts['num_cut']}")
    peak = max(phase.peak_mib for phase in found.phases[TOGETHER])
    print(f"memory: {found.rest.resident_mib:.0f} MiB at rest, {peak:.0f} at the peak, {bound_mib:.0f} is the bound")
    rows = [["at rest", *found.rest[:2], 0], ["when all have gone", *found.left[:2], found.status.pages.active]]
    print(table(["", "threads", "descriptors", "pages held"], rows))


def spread_of(phases: Sequence[Phase], name: str) -> Spread:
    return spread(getattr(phase, name) for phase in phases)


def digits(name: str) -> int:
    return 2 if name.endswith("share") else 1 if name not in ("running", "parked", "peak_mib") else 0


def main() -> int:
    args = parse_arguments()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="ferrum-bench-") as directory:
        found = anyio.run(measure, args, Path(directory), backend_options={"use_uvloop": True})
    ratios = [mine.p99 / alone.p99 for mine, alone in zip(found.phases[TOGETHER], found.phases[ALONE], strict=True)]
    bound_mib = memory_bound_mib(found.rest, daemon_limits(args), args.connections, args.connections * args.streams)
    broken = violations(found, ratios, bound_mib, is_smoke=args.smoke)
    show(found, ratios, bound_mib)
    for text in broken:
        print(f"violation: {text}")
    names = ("connections", "streams", "repeats", "seconds", "settle", "step_ms", "stall")
    kinds = {kind: {name: spread_of(phases, name) for name in Phase._fields} for kind, phases in found.phases.items()}
    finish(
        "daemon_load",
        facts,
        {name: getattr(args, name) for name in names},
        {
            **kinds,
            "p99_ratio": spread(ratios),
            "counts": found.counts,
            "memory_mib": {"rest": found.rest.resident_mib, "bound": bound_mib},
            "rest": found.rest._asdict(),
            "left": {**found.left._asdict(), "pages": found.status.pages.active},
            "violations": broken,
        },
    )
    return 1 if broken else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What do slow and dying clients of the daemon cost the others?")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--streams", type=int, default=5, help="of each connection")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds before it")
    parser.add_argument("--step-ms", type=float, default=50.0, help="of the fake executor")
    parser.add_argument("--stall", type=float, default=2.0, help="the daemon's limit for who does not read, in seconds")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.connections, args.streams, args.repeats = 20, 2, 1
        args.seconds, args.settle, args.step_ms, args.stall = 1.0, 0.5, 2.0, 1.0
    return args


if __name__ == "__main__":
    sys.exit(main())
