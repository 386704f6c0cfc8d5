"""What do slow and dying clients of the daemon cost the others, and what do they leave behind?

One daemon, the real one over a fake executor that sleeps through its steps, and 1,000 streams over 200 connections. Eight
tenths of the connections are healthy; a tenth reads slowly or not at all, and a tenth is killed at random moments, again and
again (``bench/load_clients.py``). Two phases take turns: *alone* has the healthy ones only, *together* has them all. Asked are

- the time between two chunks of a healthy stream, as it is seen by the client: its p99 together over that alone, for each
  repeat. At most 1.5 is allowed, for the median of the repeats;
- the daemon's peak of memory, which must be below the bound that docs/architecture.md states;
- what is left when everybody has gone: threads, descriptors and active pages must be exactly what they were before anybody
  came, and the daemon must then end with status 0.

Where one of these does not hold, it says so in a line that begins with "violation", and ends with status 1.

    python -m bench.daemon_load [--connections 200] [--streams 5] [--repeats 5] [--seconds 8] [--step-ms 50]
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

import ferrum_rt
from bench._common import finish, machine, progress, spread, table
from bench.load_clients import OUTPUT_TOKENS, PROMPT_CHARACTERS
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
    """Seconds of the processor: of the whole daemon, and of its event loop's thread."""

    process: float
    loop: float


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
        return Times(_cpu_s(self._proc / "stat"), _cpu_s(self._proc / "task" / str(self.process.pid) / "stat"))

    async def settled(self, same_as: Footprint | None = None) -> tuple[EngineStatus, Footprint]:
        """When no request is under way, no page is held and nobody is connected; or what there is after ``WAIT_S``. Then
        threads and descriptors are looked at until they are those of ``same_as``, or for as long again."""
        async with ferrum_rt.connect(self.path) as engine:
            status = await engine.status()
            with anyio.move_on_after(WAIT_S):
                while status.requests.running or status.requests.waiting or status.requests.parked or status.pages.active:
                    await anyio.sleep(0.05)
                    status = await engine.status()
        found = self.footprint()
        with anyio.move_on_after(WAIT_S):
            while same_as is not None and found[:2] != same_as[:2]:
                await anyio.sleep(0.05)
                found = self.footprint()
        return status, found


def _cpu_s(stat: Path) -> float:
    fields = stat.read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100  # utime and stime, in ticks of 1/100 s


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
    command = [sys.executable, "-m", "bench.load_clients", kind, str(path), str(connections), str(streams)]
    async with await anyio.open_process(command, stderr=None) as process:
        try:
            group = Clients(process)
            await group.answer()
            yield group
        finally:
            process.kill()


@dataclass
class Phase:
    """What was seen in one phase. ``clients`` are the answers of the three kinds."""

    kind: str
    clients: dict[str, dict[str, Any]]
    steps_per_s: float
    executor_ms: float
    scheduler_ms: float
    loop_share: float
    daemon_share: float
    requests: dict[str, int]
    footprint: Footprint

    @property
    def healthy(self) -> dict[str, Any]:
        return self.clients["healthy"]


@dataclass
class Load:
    """A running daemon with its clients."""

    args: argparse.Namespace
    daemon: Daemon
    groups: Mapping[str, Clients]
    engine: ferrum_rt.InferenceEngine
    phases: list[Phase] = field(default_factory=list)

    async def phase(self, kind: str) -> None:
        hostile = ("slow", "doomed") if kind == TOGETHER else ()
        for name in hostile:
            await self.groups[name].tell("begin")
        await anyio.sleep(self.args.settle)
        self.daemon.forget_peak()
        before, times = await self._metrics(), self.daemon.times()
        began = anyio.current_time()
        await self.groups["healthy"].tell("begin")
        await anyio.sleep(self.args.seconds)
        seen = {"healthy": await self.groups["healthy"].tell("end")}
        wall = anyio.current_time() - began
        after, times_after = await self._metrics(), self.daemon.times()
        counts, footprint = (await self.engine.status()).requests, self.daemon.footprint()
        for name in hostile:
            seen[name] = await self.groups[name].tell("end")
        steps = max(1, after.steps - before.steps)
        self.phases.append(
            Phase(
                kind=kind,
                clients=seen,
                steps_per_s=steps / wall,
                executor_ms=1e3 * (after.step_s - before.step_s) / steps,
                scheduler_ms=1e3 * (after.host_s - before.host_s) / steps,
                loop_share=(times_after.loop - times.loop) / wall,
                daemon_share=(times_after.process - times.process) / wall,
                requests={"running": counts.running, "waiting": counts.waiting, "parked": counts.parked},
                footprint=footprint,
            )
        )
        progress(f"{kind}: p99 {seen['healthy'].get('p99_ms', 0):.1f} ms, {footprint.resident_mib:.0f} MiB, {counts}")

    async def _metrics(self) -> EngineMetrics:
        self.engine.metrics()
        await self.engine.health_check()  # its answer comes behind that to the question which the line above has sent
        return self.engine.metrics()


class Found(NamedTuple):
    """Everything. ``rest`` is the daemon before anybody came, ``used`` once all of its pages had been used, ``left`` when all
    had gone."""

    phases: list[Phase]
    rest: Footprint
    used: Footprint
    left: Footprint
    status: EngineStatus
    exit_status: int


async def measure(args: argparse.Namespace, directory: Path) -> Found:
    path = directory / "s"
    (directory / "daemon.toml").write_text(f'[daemon]\nlog_level = "warning"\n[daemon.limits]\nstall_s = {args.stall}\n')
    options = {"config": engine_config(args), "step_s": args.step_ms / 1e3, "config_file": str(directory / "daemon.toml")}
    async with daemon_process(path, **options) as process:
        daemon = Daemon(process, path)
        async with ferrum_rt.connect(path) as engine:  # whatever the first client makes it load and open
            await engine.infer("warm", max_tokens=5)
        _, rest = await daemon.settled()
        progress(f"at rest: {rest}")
        async with AsyncExitStack() as stack:
            groups = {}
            for kind, connections in shares(args.connections).items():
                group = await stack.enter_async_context(clients(kind, path, connections, args.streams))
                groups[kind] = group
            engine = await stack.enter_async_context(ferrum_rt.connect(path))
            await use_all_pages(engine)
            load = Load(args, daemon, groups, engine)
            used = daemon.footprint()
            for repeat in range(args.repeats):
                for kind in (ALONE, TOGETHER) if repeat % 2 == 0 else (TOGETHER, ALONE):
                    await load.phase(kind)
        status, left = await daemon.settled(rest)
        progress(f"all have gone: {left}")
        process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(WAIT_S):
            while process.poll() is None:
                await anyio.sleep(0.05)
        return Found(load.phases, rest, used, left, status, process.poll())


async def use_all_pages(engine: ferrum_rt.InferenceEngine) -> None:
    """The healthy streams fill the pool, so that what it takes to keep the books of all pages is known."""
    progress("filling the page pool")
    while (await engine.status()).pages.free:
        await anyio.sleep(0.2)


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


def main() -> None:
    args = parse_arguments()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="ferrum-bench-") as directory:
        found = anyio.run(measure, args, Path(directory), backend_options={"use_uvloop": True})
    for phase in found.phases:
        print(phase)
    print(found[1:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What do slow and dying clients of the daemon cost the others?")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--streams", type=int, default=5, help="of each connection")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--settle", type=float, default=2.0, help="seconds before it")
    parser.add_argument("--step-ms", type=float, default=50.0, help="of the fake executor")
    parser.add_argument("--stall", type=float, default=4.0, help="the daemon's limit for who does not read, in seconds")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.connections, args.streams, args.repeats = 20, 2, 1
        args.seconds, args.settle, args.step_ms, args.stall = 1.0, 0.5, 2.0, 1.0
    return args


if __name__ == "__main__":
    main()
