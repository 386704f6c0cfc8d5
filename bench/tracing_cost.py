"""What does tracing cost?

One engine of the demo model in this process, ``--users`` users who each send a request when they have the last one's answer,
and the same work again and again,

- *untraced*: with tracing and metrics patched out, as if they had never been written;
- *API alone*: as a host has it that has no SDK of OpenTelemetry;
- *SDK*: with every request and ten steps a second recorded, handed in batches to an exporter that discards them, and all
  metrics read once a second.

Then, against *SDK*, with exporters that *raise*, *hang* for ever, or find that the collector's address *refuses* them: how
much longer requests take at p99.

In a round each of them has two turns: one in an order of the round's own, and one in the opposite order, so that a machine
that slows down in the meantime slows down all alike. Ratios are taken within each round; shown are their median, and between
which two of them it lies with 95 % confidence, by their ranks. Prompts are never the same: nothing is in the prefix cache.

Throughput on a shared machine is too noisy for shares of a per cent. So the calls that tracing consists of are also timed by
themselves, those of a whole request with a chunk for each token, as a share of the processor time that such a request takes.

The bounds: SDK takes at most 2 % more time, the API alone less than 0.3 %, and no exporter adds more than 5 % to p99.
A median is within them or not; a bound that lies inside of the interval needs more rounds. Processor time is that of the
process in all its threads.

    python -m bench.tracing_cost [--rounds 100] [--requests 32] [--latency-rounds 20] [--latency-requests 64]
"""

import argparse
import enum
import gc
import logging
import math
import random
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import anyio
import msgspec
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from bench._common import Spread, finish, machine, progress, quantile, table
from ferrum_rt.daemon.span_export import CountedSpans
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.scheduler import BatchPlan
from ferrum_rt.interfaces.types import FinishReason, ModelId, StreamChunk, TokenId, Usage
from ferrum_rt.runtime import generation, runtime
from ferrum_rt.runtime.runtime import Runtime, open_runtime
from ferrum_rt.runtime.step_trace import StepTrace
from ferrum_rt.runtime.tracing import RequestTrace
from tests.fakes.telemetry import instruments_of, measured_by, traced_by

EXPORT_EVERY_S = 0.2
READ_EVERY_S = 1.0


class Kind(enum.StrEnum):
    UNTRACED = "untraced"
    API = "API alone"
    SDK = "SDK"
    RAISES = "raises"
    HANGS = "hangs"
    REFUSES = "refuses"


COSTS, FAULTS = (Kind.API, Kind.SDK), (Kind.RAISES, Kind.HANGS, Kind.REFUSES)
THROUGHPUT_BOUNDS = {Kind.API: 0.003, Kind.SDK: 0.02}
P99_BOUND = 0.05


# -- what is recorded -----------------------------------------------------------------------------------------------------


class Untraced:
    """A RequestTrace that is none."""

    is_recording, link = False, None

    def __init__(self, *_: object, captures: bool) -> None:
        pass

    def nothing(self, *_: object, **__: object) -> None:
        pass

    enter = start = preempt = chunk = advance = end = nothing


def launched(steps: StepTrace, plan: BatchPlan) -> None:
    """What a request's own times need, of what StepTrace does when a step is launched."""
    if plan.step.assigned:
        now = time.monotonic()
        for assigned in plan.step.assigned:
            if (found := steps._active.get(assigned.request_id)) is not None:
                found.started(now)


@contextmanager
def untraced() -> Iterator[None]:
    with (
        patch.object(generation, "RequestTrace", Untraced),
        patch.object(StepTrace, "launched", launched),
        patch.object(StepTrace, "landed", Untraced.nothing),
        patch.object(runtime, "record", lambda *_: None),
    ):
        yield


class Discarding(SpanExporter):
    """After it has called ``first``, which may raise or wait."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        self._first = first

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._first()
        return SpanExportResult.SUCCESS


def raise_a_fault() -> None:
    raise ZeroDivisionError


@contextmanager
def exporter_of(kind: Kind) -> Iterator[SpanExporter]:
    """When the block ends it lets go of whatever hangs in it."""
    match kind:
        case Kind.RAISES:
            yield Discarding(raise_a_fault)
        case Kind.HANGS:
            released = threading.Event()
            yield Discarding(released.wait)
            released.set()
        case Kind.REFUSES:
            with socket.create_server(("127.0.0.1", 0)) as closed_soon:
                port = closed_soon.getsockname()[1]
            exporter: SpanExporter = OTLPSpanExporter(f"http://127.0.0.1:{port}/v1/traces", timeout=5.0)
            yield exporter
            exporter.shutdown()
        case _:
            yield Discarding()


@contextmanager
def read_regularly(reader: InMemoryMetricReader) -> Iterator[None]:
    """Beginning half-way through the first interval, so that however long it takes there is one for each on average."""
    stopped = threading.Event()

    def run() -> None:
        wait_s = READ_EVERY_S / 2
        while not stopped.wait(wait_s):
            reader.get_metrics_data()
            wait_s = READ_EVERY_S

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def recorded(kind: Kind, engine: Runtime) -> Iterator[Callable[[], object]]:
    """The SDK as a process of ours has it, with the exporter of this kind. Yields what has to be called at the end of what
    is measured: it hands on what still waits."""
    reader = InMemoryMetricReader()
    meters, tracers = MeterProvider([reader], shutdown_on_exit=False), TracerProvider(shutdown_on_exit=False)
    instruments = instruments_of(meters)
    instruments.watch(engine, engine.model_info.id)
    with exporter_of(kind) as exporter:
        spans = CountedSpans(exporter, every_s=EXPORT_EVERY_S)
        tracers.add_span_processor(spans)
        with traced_by(tracers), measured_by(instruments), read_regularly(reader):
            yield spans.force_flush if kind is Kind.SDK else lambda: None
    spans.shutdown()
    meters.shutdown()
    if kind is Kind.SDK and spans.num_lost:
        raise RuntimeError(f"{spans.num_lost} spans were lost: that was cheaper than it ought to be")


# -- measuring ------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One kind's, with so many tokens and each request's latency."""

    tokens: int
    wall_s: float
    cpu_s: float
    latencies_s: list[float]


class Work(NamedTuple):
    """What each turn has to do."""

    requests: int
    users: int
    prompt_tokens: int
    output_tokens: int


async def take_turn(engine: Runtime, kind: Kind, work: Work, rng: random.Random) -> Turn:
    size = engine.model_info.vocab_size
    prompts = deque(rng.choices(range(size), k=work.prompt_tokens) for _ in range(work.requests))
    latencies: list[float] = []

    async def user() -> None:
        while prompts:
            began = time.perf_counter()
            await engine.infer(prompts.popleft(), max_tokens=work.output_tokens, temperature=0.0, ignore_eos=True)
            latencies.append(time.perf_counter() - began)

    with ExitStack() as stack:
        flush: Callable[[], object] = lambda: None  # noqa: E731 - as recorded() has it
        if kind is Kind.UNTRACED:
            stack.enter_context(untraced())
        elif kind is not Kind.API:
            flush = stack.enter_context(recorded(kind, engine))
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for _ in range(work.users):
                tasks.start_soon(user)
        flush()
        took = time.perf_counter() - wall, time.process_time() - cpu
    return Turn(work.requests * work.output_tokens, *took, latencies)


Round = Mapping[Kind, Sequence[Turn]]


async def play(engine: Runtime, kinds: Sequence[Kind], work: Work, rng: random.Random) -> Round:
    """Two turns of each."""
    turns: dict[Kind, list[Turn]] = {kind: [] for kind in kinds}
    order = rng.sample(kinds, len(kinds))
    for kind in (*order, *reversed(order)):
        turns[kind].append(await take_turn(engine, kind, work, rng))
    return turns


CALLS_AT_ONCE, CALLS_REPEATS = 200, 15


def calls_alone(kind: Kind, output_tokens: int) -> Spread:
    """Microseconds of the processor's time for all that tracing does for one request; in batches of many requests."""
    request = build_request("x", {"max_tokens": output_tokens})
    chunk = StreamChunk(request_id=request.id, token_ids=[TokenId(1)])
    last = msgspec.structs.replace(
        chunk, finish_reason=FinishReason.LENGTH, usage=Usage(prompt_tokens=1, completion_tokens=output_tokens)
    )

    def trace_one() -> None:
        now = time.monotonic()
        traced = RequestTrace(request, ModelId("demo"), now)
        traced.start(now)
        traced.chunk(1, 0, now)
        for _ in range(output_tokens - 1):
            traced.advance(chunk, now)
        traced.advance(last, now)
        traced.end(now, outcome="finished", ttft_s=0.0, prompt_tokens=1, output_tokens=output_tokens, error=None)

    def batch_us() -> float:
        began = time.process_time()
        for _ in range(CALLS_AT_ONCE):
            trace_one()
        flush()
        return 1e6 * (time.process_time() - began) / CALLS_AT_ONCE

    with ExitStack() as stack:
        flush: Callable[[], object] = lambda: None  # noqa: E731 - as recorded() has it
        if kind is Kind.SDK:
            spans, tracers = CountedSpans(Discarding(), every_s=EXPORT_EVERY_S), TracerProvider(shutdown_on_exit=False)
            tracers.add_span_processor(spans)
            stack.callback(spans.shutdown)
            stack.enter_context(traced_by(tracers))
            flush = spans.force_flush
        return interval(batch_us() for _ in range(CALLS_REPEATS))


def rate(turns: Iterable[Turn]) -> float:
    """Tokens per second."""
    turns = list(turns)
    return sum(turn.tokens for turn in turns) / sum(turn.wall_s for turn in turns)


def cpu_us(turns: Iterable[Turn]) -> float:
    """Microseconds of the processor's time per token."""
    turns = list(turns)
    return 1e6 * sum(turn.cpu_s for turn in turns) / sum(turn.tokens for turn in turns)


def p99_ms(turns: Iterable[Turn]) -> float:
    return 1e3 * quantile((latency for turn in turns for latency in turn.latencies_s), 0.99)


# -- results --------------------------------------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> Spread:
    """The median, and the values between which it lies with 95 % confidence: by their ranks. Half of them are below it, give
    or take 1.96 standard deviations of a binomial distribution."""
    known = sorted(values)
    middle, margin = len(known) / 2, 0.98 * math.sqrt(len(known))
    low, high = max(0, math.floor(middle - margin)), min(len(known) - 1, math.ceil(middle + margin))
    return Spread(statistics.median(known), known[low], known[high])


def of_all(rounds: Sequence[Round], figure: Callable[[Sequence[Turn]], float]) -> dict[str, Spread]:
    return {kind.value: interval(figure(each[kind]) for each in rounds) for kind in rounds[0]}


def shares(
    rounds: Sequence[Round], kinds: Iterable[Kind], over: Kind, figure: Callable[[Sequence[Turn]], float]
) -> dict[str, Spread]:
    """How much larger it is than that of ``over``, within each round, as a share."""
    return {kind.value: interval(figure(each[kind]) / figure(each[over]) - 1 for each in rounds) for kind in kinds}


def summarize(costs: Sequence[Round], faults: Sequence[Round], output_tokens: int) -> dict[str, Any]:
    # Time per token, so that a cost is positive.
    time_added = shares(costs, COSTS, Kind.UNTRACED, lambda turns: 1 / rate(turns))
    p99_added = shares(faults, FAULTS, Kind.SDK, p99_ms)
    request_us = output_tokens * of_all(costs, cpu_us)[Kind.UNTRACED.value].median
    alone = {kind.value: calls_alone(kind, output_tokens) for kind in COSTS}
    return {
        "calls_alone_us": alone,
        "calls_alone_share": {name: found.median / request_us for name, found in alone.items()},
        "tokens_per_s": of_all(costs, rate),
        "cpu_us_per_token": of_all(costs, cpu_us),
        "time_added": time_added,
        "cpu_added": shares(costs, COSTS, Kind.UNTRACED, cpu_us),
        "p99_ms": of_all(faults, p99_ms),
        "p99_added": p99_added,
        "bounds_met": {
            **{kind.value: time_added[kind.value].median <= bound for kind, bound in THROUGHPUT_BOUNDS.items()},
            **{kind.value: p99_added[kind.value].median <= P99_BOUND for kind in FAULTS},
        },
    }


def percent(share: Spread) -> str:
    return Spread(*(100 * value for value in share)).show(2)


def show(results: Mapping[str, Any]) -> None:
    print("Median, and between which it lies with 95 % confidence; shares are of what the untraced engine takes")
    rows = [
        [
            name,
            found.show(0),
            results["cpu_us_per_token"][name].show(),
            percent(results["time_added"][name]) if name in results["time_added"] else "",
            percent(results["cpu_added"][name]) if name in results["cpu_added"] else "",
        ]
        for name, found in results["tokens_per_s"].items()
    ]
    print(table(["", "tokens/s", "processor time per token in µs", "time added, %", "processor time added, %"], rows))
    for name, found in results["calls_alone_us"].items():
        share = results["calls_alone_share"][name]
        print(f"{name}: the calls of one request alone take {found.show()} µs, {100 * share:.2f} % of what it takes")
    print("\nLatency of requests at p99, with exporters that fail")
    rows = [
        [name, found.show(), percent(results["p99_added"][name]) if name in results["p99_added"] else ""]
        for name, found in results["p99_ms"].items()
    ]
    print(table(["", "p99 in ms", "added, %"], rows))
    print("\nWithin the bounds:", ", ".join(f"{name} {met}" for name, met in results["bounds_met"].items()))


async def run(args: argparse.Namespace) -> tuple[list[Round], list[Round]]:
    rng = random.Random(1)
    sizes = (args.users, args.prompt_tokens, args.output_tokens)
    found: list[list[Round]] = []
    async with open_runtime(args.model, scheduler={"max_running_requests": args.users}) as engine:
        for kinds, num_rounds, num_requests in (
            ((Kind.UNTRACED, *COSTS), args.rounds, args.requests),
            ((Kind.SDK, *FAULTS), args.latency_rounds, args.latency_requests),
        ):
            work = Work(num_requests, *sizes)
            await play(engine, kinds, work, rng)  # to warm up
            rounds = []
            for number in range(num_rounds):
                rounds.append(await play(engine, kinds, work, rng))
                rates = ", ".join(f"{kind} {rate(turns):.0f}" for kind, turns in rounds[-1].items())
                progress(f"round {number + 1} of {num_rounds}, tokens/s: {rates}")
            found.append(rounds)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="What does tracing cost?")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--requests", type=int, default=32, help="of a turn")
    parser.add_argument("--latency-rounds", type=int, default=20)
    parser.add_argument("--latency-requests", type=int, default=64, help="of a turn")
    parser.add_argument("--users", type=int, default=16, help="requests under way at a time")
    parser.add_argument("--prompt-tokens", type=int, default=202, help="ShareGPT's mean")
    parser.add_argument("--output-tokens", type=int, default=179, help="ShareGPT's mean")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = args.latency_rounds = 1
        args.requests = args.latency_requests = args.users = 2
        args.prompt_tokens, args.output_tokens = 8, 8
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # of exporters that fail there is nothing to tell
    facts = machine()
    costs, faults = anyio.run(run, args, backend_options={"use_uvloop": args.loop == "uvloop"})
    results = summarize(costs, faults, args.output_tokens)
    show(results)
    names = ("rounds", "requests", "latency_rounds", "latency_requests", "users", "prompt_tokens", "output_tokens", "loop")
    settings = {"model": args.model or "demo", **{name: getattr(args, name) for name in names}}
    finish("tracing_cost", facts, settings, results)


if __name__ == "__main__":
    main()
