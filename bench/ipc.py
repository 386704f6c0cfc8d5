"""What does the daemon cost over the engine in-process, beside grpc.aio and zmq.asyncio doing the same job?

Every contender has the same engine: the real Runtime over a fake executor that sleeps ``step_s`` in each step and computes
next to nothing. In-process it is opened by the process that reads; the daemon and the two peers (bench/_ipc_peers.py, which
also says what they are spared) are processes of their own, behind Unix sockets. All event loops are uvloop's.

*Latency*: one client with one stream at a time, through each contender's own asyncio client. They take turns of ten
requests, in a new order each time, so that noise hits all alike and few requests find a server that has lain idle. First
token: from the call to the first chunk; per token: from the end of the step, which the executor notes where all processes
can read it, to the chunk in the reader's hands. Steps take 2 ms: a chunk is then handed out beside the step that follows, as
with a model, and not in competition with it. Beside them stands what any two processes pay, after a pause as long as a
step: the round trip of 100 bytes through a bare blocking socket; and what any two asyncio processes pay that speak this
protocol: the round trip of a submit and a chunk with nothing behind it.

*Processor time*: of the server's process, in all threads, over the tokens that it streams while so many clients (a client is
a connection) read so many streams each. One other process, this one, holds all connections and reads as little as it can;
its share of a core is shown, for a load that is short of time would spare the server work. *Added* is less what the engine
takes in-process, with as many readers that do nothing. Steps are long enough that no contender is short of time.

    python -m bench.ipc [--repeats 5] [--requests 200] [--seconds 1.0]
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.to_thread
import uvloop
import zmq.asyncio

from bench import _ipc_load
from bench._common import Spread, finish, machine, progress, quantile, spread, table
from bench._ipc_load import PROMPT, Load, Sample
from bench._ipc_peers import Ask, LeastClient, grpc_channel, grpc_method, infer_stream, zmq_dealer, zmq_stream
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import StreamChunk
from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.convert import to_wire
from ferrum_rt.ipc.messages import Submit
from tests.fakes.daemon import ROOT, daemon_process
from tests.fakes.executor import mapped_clock
from tests.runtime.engines import fake_engine

T = TypeVar("T")

IN_PROCESS, DAEMON, GRPC, ZMQ = "in-process", "daemon", "grpc.aio", "zmq.asyncio"
CONTENDERS = (IN_PROCESS, DAEMON, GRPC, ZMQ)
LATENCY_STEP_S = 0.002
TOKENS = 8
PAUSE_S = 0.001
IN_A_ROW = 10


class Row(NamedTuple):
    """Of the second table, with the goal for what the daemon adds to a token, in microseconds."""

    clients: int
    streams: int
    step_s: float
    goal_us: float | None = None


ROWS = [Row(1, 1, 0.002), Row(32, 1, 0.010, goal_us=5.0), Row(256, 1, 0.060), Row(32, 8, 0.060, goal_us=2.0)]
GOAL_FIRST_TOKEN_US = 150.0

Stream = Callable[[], AbstractAsyncContextManager[AsyncIterator[StreamChunk]]]
"""A request of ``TOKENS`` tokens."""


class Contender(NamedTuple):
    """``clock`` has the moment at which the engine's last step ended."""

    stream: Stream
    clock: "memoryview[float]"


Samples = dict[str, list[Sample]]
"""By contender."""


def shuffled(items: Mapping[str, T], seed: int) -> list[tuple[str, T]]:
    """The contenders in an order of their own each time: none always comes behind the same one, or first."""
    return random.Random(seed).sample(list(items.items()), len(items))


# -- servers --------------------------------------------------------------------------------------------------------------


@contextmanager
def child(module: str, *arguments: str) -> Any:
    """A Python process, killed at the end of the block. It writes a line when it is ready."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def line_from(process: Any) -> str:
    line: str = await anyio.to_thread.run_sync(process.stdout.readline)
    if not line:
        raise RuntimeError("a child process has ended; its standard error says why")
    return line


def engine_options(num_streams: int, max_tokens: int, step_s: float) -> dict[str, Any]:
    """What tests.fakes.daemon takes. All streams can begin in one step."""
    num_prompt_tokens = len(PROMPT)
    config = {
        "scheduler": {"max_running_requests": num_streams},
        "batching": {"max_batched_tokens": max(512, num_streams * (num_prompt_tokens + 1))},
        "max_model_len": num_prompt_tokens + max_tokens,
    }
    return {"config": config, "step_s": step_s}


@asynccontextmanager
async def servers(
    directory: Path, options: dict[str, Any], clocks: Mapping[str, str | None]
) -> AsyncIterator[dict[str, tuple[str, int]]]:
    """(socket, process id) of each server; ``clocks`` are where their executors note the ends of their steps. They
    start side by side."""
    paths = {name: directory / f"{name}.sock" for name in (DAEMON, GRPC, ZMQ)}
    with ExitStack() as stack:
        peers = {
            name: stack.enter_context(
                child("bench._ipc_peers", name, str(paths[name]), json.dumps(options | {"clock": clocks[name]}))
            )
            for name in (GRPC, ZMQ)
        }
        async with daemon_process(paths[DAEMON], **options, clock=clocks[DAEMON]) as daemon:
            for peer in peers.values():
                await line_from(peer)
            processes = {DAEMON: daemon, **peers}
            yield {name: (str(paths[name]), process.pid) for name, process in processes.items()}


# -- latency --------------------------------------------------------------------------------------------------------------


class Latency(NamedTuple):
    """Microseconds, of one contender in one repeat."""

    first_p50: float
    first_p99: float
    token_p50: float
    token_p99: float


@asynccontextmanager
async def clients(directory: Path) -> AsyncIterator[dict[str, Contender]]:
    """The contenders, each with an open connection."""
    options = engine_options(1, TOKENS, LATENCY_STEP_S)
    ask = Ask(PROMPT, TOKENS)

    @asynccontextmanager
    async def through_grpc() -> AsyncIterator[AsyncIterator[StreamChunk]]:
        yield method(ask)

    async with AsyncExitStack() as stack:
        clocks = {name: directory / f"{name}.clock" for name in CONTENDERS}
        for clock in clocks.values():
            clock.write_bytes(bytes(8))
        places = {name: str(clock) for name, clock in clocks.items()}
        serving = await stack.enter_async_context(servers(directory, options, places))
        fake = fake_engine(options["config"], step_s=LATENCY_STEP_S, clock=places[IN_PROCESS])
        engine, _ = await stack.enter_async_context(fake)
        remote: Any = await stack.enter_async_context(connect(serving[DAEMON][0]))
        method = grpc_method(await stack.enter_async_context(grpc_channel(serving[GRPC][0])))
        context = stack.enter_context(zmq.asyncio.Context())
        dealer = stack.enter_context(zmq_dealer(context, serving[ZMQ][0]))
        streams: dict[str, Stream] = {
            IN_PROCESS: lambda: infer_stream(engine, ask),
            DAEMON: lambda: infer_stream(remote, ask),
            GRPC: through_grpc,
            ZMQ: lambda: zmq_stream(dealer, ask),
        }
        yield {name: Contender(stream, mapped_clock(places[name])) for name, stream in streams.items()}


async def time_request(contender: Contender) -> list[float]:
    """Seconds from the call to the first chunk, and to each further one from its step's end."""
    times: list[float] = []
    began, clock = time.perf_counter(), contender.clock
    async with contender.stream() as chunks:
        async for _ in chunks:
            now = time.perf_counter()
            times.append(now - (clock[0] if times else began))
    await anyio.sleep(PAUSE_S)  # what a request leaves to be done shall not fall into the next
    if len(times) != TOKENS:
        raise RuntimeError(f"{len(times)} chunks came for {TOKENS} tokens")
    return times


@asynccontextmanager
async def bare_socket(path: Path) -> AsyncIterator[socket.socket]:
    with child("bench._ipc_peers", "bare", str(path)) as process, socket.socket(socket.AF_UNIX) as connection:
        await line_from(process)
        connection.connect(str(path))
        yield connection


def time_round_trip(connection: socket.socket) -> float:
    """In seconds, from a sleep to the answer."""
    time.sleep(LATENCY_STEP_S)
    began = time.perf_counter()
    connection.sendall(bytes(100))
    connection.recv(100)
    return time.perf_counter() - began


@asynccontextmanager
async def least_client(path: Path) -> AsyncIterator[LeastClient]:
    with child("bench._ipc_peers", "least", str(path)) as process:
        await line_from(process)
        transport, client = await asyncio.get_running_loop().create_unix_connection(LeastClient, str(path))
        try:
            yield client
        finally:
            transport.close()


async def time_least(client: LeastClient) -> float:
    """In seconds, from a request that is built, as it is in-process, to its chunk."""
    request = build_request(PROMPT, {"max_tokens": TOKENS})
    await anyio.sleep(LATENCY_STEP_S)
    began = time.perf_counter()
    await client.ask(Submit(request_id="1", request=to_wire(request), credit=TOKENS))
    return time.perf_counter() - began


class Floors(NamedTuple):
    """Microseconds, the medians of each repeat."""

    bare: list[float]
    least: list[float]


async def measure_latency(repeats: int, requests: int) -> tuple[dict[str, list[Latency]], Floors]:
    """Of each contender, and of what is below them all."""
    taken: dict[str, list[Latency]] = {}
    floors = Floors([], [])
    with tempfile.TemporaryDirectory(prefix="ferrum-bench-") as folder:
        directory = Path(folder)
        bare_path, least_path = directory / "bare.sock", directory / "least.sock"
        async with clients(directory) as contenders, bare_socket(bare_path) as bare, least_client(least_path) as least:
            for repeat in range(repeats + 1):
                bare_times: list[float] = []
                least_times: list[float] = []
                times: dict[str, list[list[float]]] = {name: [] for name in contenders}
                for number in range(-(-requests // IN_A_ROW) if repeat else 1):
                    for name, contender in shuffled(contenders, number):
                        times[name] += [await time_request(contender) for _ in range(IN_A_ROW)]
                    bare_times += [1e6 * time_round_trip(bare) for _ in range(IN_A_ROW)]
                    least_times += [1e6 * await time_least(least) for _ in range(IN_A_ROW)]
                if not repeat:
                    continue  # it warms up
                floors.bare.append(quantile(bare_times, 0.5))
                floors.least.append(quantile(least_times, 0.5))
                for name, measured in times.items():
                    firsts = [1e6 * gaps[0] for gaps in measured]
                    tokens = [1e6 * gap for gaps in measured for gap in gaps[1:]]
                    figures = (quantile(values, share) for values in (firsts, tokens) for share in (0.5, 0.99))
                    taken.setdefault(name, []).append(Latency(*figures))
                progress(f"latency, repeat {repeat} of {repeats}: " + _firsts(taken))
    return taken, floors


def _firsts(taken: Mapping[str, list[Latency]]) -> str:
    return ", ".join(f"{name} {latencies[-1].first_p50:.0f} µs" for name, latencies in taken.items())


# -- processor time -------------------------------------------------------------------------------------------------------


async def measure_row(row: Row, repeats: int, seconds: float) -> Samples:
    load = Load(row.clients, row.streams, max(2, round(seconds / row.step_s)))
    options = engine_options(load.num_streams, load.tokens, row.step_s)
    samples: Samples = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="ferrum-bench-") as directory:
        with child("bench._ipc_load", json.dumps(options)) as in_process:
            async with servers(Path(directory), options, dict.fromkeys(CONTENDERS)) as serving:
                await line_from(in_process)

                async def run_in_process() -> Sample:
                    in_process.stdin.write(json.dumps(load) + "\n")
                    in_process.stdin.flush()
                    return Sample(*json.loads(await line_from(in_process)))

                loads = {DAEMON: _ipc_load.load_daemon, GRPC: _ipc_load.load_grpc, ZMQ: _ipc_load.load_zmq}
                runs: dict[str, Callable[[], Awaitable[Sample]]] = {
                    IN_PROCESS: run_in_process,
                    **{name: partial(run, *serving[name], load) for name, run in loads.items()},
                }
                for repeat in range(repeats):
                    for name, run in shuffled(runs, repeat):
                        samples[name].append(await run())
                    found = ", ".join(f"{name} {samples[name][-1].us_per_token:.1f}" for name in runs)
                    progress(f"{_shape(row)}, repeat {repeat + 1} of {repeats}: {found} µs per token")
    return samples


def _shape(row: Row) -> str:
    return f"{row.clients} x {row.streams}"


# -- what comes out -------------------------------------------------------------------------------------------------------


def added(taken: Mapping[str, list[Any]], name: str, figure: str) -> Spread:
    """What a contender takes more than the engine in-process, in each repeat."""
    pairs = zip(taken[name], taken[IN_PROCESS], strict=True)
    return spread(getattr(ours, figure) - getattr(base, figure) for ours, base in pairs)


def latency_report(taken: Mapping[str, list[Latency]]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, latencies in taken.items():
        report[name] = {figure: spread(getattr(item, figure) for item in latencies) for figure in Latency._fields}
        if name != IN_PROCESS:
            report[name]["added"] = {figure: added(taken, name, figure) for figure in Latency._fields}
    return report


def row_report(row: Row, samples: Samples) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, taken in samples.items():
        report[name] = {figure: spread(getattr(item, figure) for item in taken) for figure in Sample._fields}
        if name != IN_PROCESS:
            report[name]["added_us_per_token"] = added(samples, name, "us_per_token")
    return {"clients": row.clients, "streams": row.streams, "planned_step_s": row.step_s, "contenders": report}


def goals(latency: Mapping[str, Any], rows: list[tuple[Row, dict[str, Any]]]) -> dict[str, bool]:
    """Whether each is met by the medians."""
    met = {
        f"first token p50: the daemon adds at most {GOAL_FIRST_TOKEN_US:g} µs": (
            latency[DAEMON]["added"]["first_p50"].median <= GOAL_FIRST_TOKEN_US
        )
    }
    for figure in Latency._fields:
        name = figure.replace("first_", "first token ").replace("token_", "per token ")
        others = [latency[peer][figure].median for peer in (GRPC, ZMQ)]
        met[f"{name}: ahead of both peers"] = latency[DAEMON][figure].median < min(others)
    for row, report in rows:
        found = report["contenders"]
        if row.goal_us is not None:
            text = f"processor time at {_shape(row)}: the daemon adds at most {row.goal_us:g} µs per token"
            met[text] = found[DAEMON]["added_us_per_token"].median <= row.goal_us
        others = [found[peer]["us_per_token"].median for peer in (GRPC, ZMQ)]
        met[f"processor time at {_shape(row)}: ahead of both peers"] = found[DAEMON]["us_per_token"].median < min(others)
    return met


def show(
    latency: Mapping[str, Any], floors: Mapping[str, Spread], rows: list[tuple[Row, dict[str, Any]]], met: Mapping[str, bool]
) -> None:
    figures = Latency._fields
    print("Microseconds, one client with one stream at a time; added: over in-process, in the same repeat")
    header = ["contender", *(f"{'first token' if 'first' in name else 'per token'} {name[-3:]}" for name in figures)]
    lines: list[list[str]] = []
    for name, found in latency.items():
        lines.append([name, *(found[figure].show(0) for figure in figures)])
        if "added" in found:
            lines.append(["  added", *(found["added"][figure].show(0) for figure in figures)])
    print(table(header, lines))
    print(
        f"After such a pause, p50: a bare socket's round trip {floors['bare'].show(0)}; of the protocol's messages between"
    )
    print(f"two event loops with nothing behind them {floors['least'].show(0)}")
    print("\nThe server's processor time per streamed token, and how busy the server and the load were")
    lines = []
    for row, report in rows:
        for name, found in report["contenders"].items():
            extra = found["added_us_per_token"].show() if "added_us_per_token" in found else ""
            shares = [f"{found[share].median:.0%}" for share in ("server_share", "load_share")]
            step = f"{1e3 * row.step_s:g} ({1e3 * found['step_s'].median:.1f})"
            lines.append([f"{_shape(row)}  {name}", step, found["us_per_token"].show(), extra, *shares])
    print(table(["clients x streams", "step ms (seen)", "µs per token", "added", "server", "load"], lines))
    print()
    print(table(["goal", ""], [[goal, "met" if is_met else "not met"] for goal, is_met in met.items()]))


async def run(args: argparse.Namespace, rows: list[Row], facts: dict[str, Any]) -> None:
    taken, found_floors = await measure_latency(args.repeats, args.requests)
    latency, floors = latency_report(taken), {name: spread(times) for name, times in found_floors._asdict().items()}
    reports = [(row, row_report(row, await measure_row(row, args.repeats, args.seconds))) for row in rows]
    met = goals(latency, reports)
    show(latency, floors, reports, met)
    settings = {
        "repeats": args.repeats,
        "requests": args.requests,
        "tokens": TOKENS,
        "latency_step_s": LATENCY_STEP_S,
        "seconds": args.seconds,
        "prompt_tokens": len(PROMPT),
        "loop": "uvloop",
        **{package: metadata.version(package) for package in ("grpcio", "pyzmq", "msgspec")},
    }
    results: dict[str, Any] = {"latency_us": latency, "round_trip_us": floors}
    results |= {"processor_time": [report for _, report in reports], "goals_met": met}
    finish("ipc", facts, settings, results)


def main() -> None:
    parser = argparse.ArgumentParser(description="What does the daemon cost over the engine in-process?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200, help="to each contender, in each repeat")
    parser.add_argument("--seconds", type=float, default=1.0, help="that each measurement of processor time takes")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    rows = ROWS
    if args.smoke:
        args.repeats, args.requests, args.seconds = 1, 3, 0.05
        rows = [Row(2, 2, 0.002, goal_us=5.0)]
    uvloop.run(run(args, rows, machine()))


if __name__ == "__main__":
    main()
