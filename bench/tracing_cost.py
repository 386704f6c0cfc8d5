"""What does tracing cost?

Of one engine in this process, ``--users`` users each send a request when they have the last one's answer, and the same work
again and again,

- *untraced*: with tracing and metrics patched out, as if they had never been written;
- *API alone*: as a host has it that has no SDK of OpenTelemetry;
- *SDK*: with every request and ten steps a second recorded, handed in batches to an exporter that discards them, and all
  metrics read once a second.

Throughput on a shared machine is too noisy for shares of a per cent. So the API alone and the SDK have turns in which each
call of tracing is timed as well: what those calls of a request take on the event loop, and the processor time of the threads
that the SDK has beside it, as a share of what a request takes. What timing an empty call takes is deducted from each. That
share is what the bounds are for: the SDK adds at most 2 %, the API alone less than 0.3 %.

Then, against *SDK*, with exporters that *raise*, *hang* for ever, or find that the collector's address *refuses* them: how
much longer requests take at p99, with the demo model, and with an executor that computes nothing and takes the same time for
each step, as a device of its own would. No exporter may add more than 5 % to the latter.

In a round each of them has two turns: one in an order of the round's own, and one in the opposite order, so that a machine
that slows down in the meantime slows down all alike. What is added is taken within each round; shown are the median over
rounds, and between which two of them it lies with 95 % confidence, by their ranks. A bound is kept if the upper end of that
is within it. Prompts are never the same: nothing is in the prefix cache.

    python -m bench.tracing_cost [--rounds 40] [--latency-rounds 40]
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
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import anyio
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from bench._common import Spread, finish, machine, progress, quantile, table
from ferrum_rt.daemon.span_export import CountedSpans
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.model_executor import DecodeOutput, PrefillOutput, StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SampledToken
from ferrum_rt.interfaces.scheduler import BatchPlan
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.runtime import generation, runtime
from ferrum_rt.runtime.runtime import Runtime, open_runtime
from ferrum_rt.runtime.step_trace import StepTrace
from ferrum_rt.runtime.threads.worker import finished
from ferrum_rt.runtime.tracing import RequestTrace
from tests.fakes.executor import FakeExecutor, fake_model
from tests.fakes.telemetry import instruments_of, measured_by, traced_by

EXPORT_EVERY_S = 0.2
READ_EVERY_S = 1.0
DEVICE_STEP_S = 0.002
EMPTY_CALLS = 10_000
THE_TOKEN = SampledToken(TokenId(65))


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


class CallTimes:
    """Seconds in the calls of tracing and metrics, of those that no other one makes; the event loop's alone."""

    def __init__(self) -> None:
        self.spent_s = self._timing_s = 0.0
        self._is_inside = False
        empty = self.timed(lambda: None)
        for _ in range(EMPTY_CALLS):
            empty()
        self._timing_s, self.spent_s = self.spent_s / EMPTY_CALLS, 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **named: object) -> Any:
            if self._is_inside:
                return function(*args, **named)
            self._is_inside, began = True, time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.spent_s += time.perf_counter() - began - self._timing_s
                self._is_inside = False

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, names in (
                (RequestTrace, ("__init__", "enter", "start", "preempt", "chunk", "advance", "end")),
                (StepTrace, ("launched", "landed")),
                (runtime, ("record",)),
            ):
                for name in names:
                    stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name))))
            yield


def other_threads() -> dict[int, float]:
    """Seconds of the processor's time of each thread of Python's but this one."""
    me = threading.get_ident()
    idents = (thread.ident for thread in threading.enumerate() if thread.ident not in (None, me))
    return {ident: time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents if ident is not None}


# -- measuring ------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One kind's, with so many tokens and each request's latency; and if its calls were timed, the seconds in them and those
    of the processor in the SDK's threads."""

    tokens: int
    wall_s: float
    cpu_s: float
    latencies_s: list[float]
    calls_s: float
    threads_s: float


class Work(NamedTuple):
    """What each turn has to do."""

    requests: int
    users: int
    prompt_tokens: int
    output_tokens: int


async def take_turn(engine: Runtime, kind: Kind, work: Work, rng: random.Random, calls: CallTimes | None = None) -> Turn:
    size = min(engine.model_info.vocab_size, 256)  # of the fake's ids the last one is the end
    prompts = deque(rng.choices(range(size), k=work.prompt_tokens) for _ in range(work.requests))
    latencies: list[float] = []

    async def user() -> None:
        while prompts:
            began = time.perf_counter()
            await engine.infer(prompts.popleft(), max_tokens=work.output_tokens, temperature=0.0, ignore_eos=True)
            latencies.append(time.perf_counter() - began)

    with ExitStack() as stack:
        threads = other_threads()
        flush: Callable[[], object] = lambda: None  # noqa: E731 - as recorded() has it
        if kind is Kind.UNTRACED:
            stack.enter_context(untraced())
        elif kind is not Kind.API:
            flush = stack.enter_context(recorded(kind, engine))
        if calls is not None:
            stack.enter_context(calls.watching())
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for _ in range(work.users):
                tasks.start_soon(user)
        flush()
        took = time.perf_counter() - wall, time.process_time() - cpu
        threads_s = sum(spent for ident, spent in other_threads().items() if ident not in threads)
    return Turn(work.requests * work.output_tokens, *took, latencies, 0.0 if calls is None else calls.spent_s, threads_s)


Round = Mapping[Kind, Sequence[Turn]]


async def play(
    engine: Runtime, kinds: Sequence[Kind], work: Work, num_rounds: int, timed: Sequence[Kind] = ()
) -> tuple[list[Round], list[Round]]:
    """Rounds of two turns for each kind, and of two with its calls ``timed``; and one more before them to warm up."""
    rng = random.Random(1)
    rounds: tuple[list[Round], list[Round]] = ([], [])
    players = [*((kind, False) for kind in kinds), *((kind, True) for kind in timed)]
    for number in range(-1, num_rounds):
        turns: dict[Kind, list[Turn]] = {kind: [] for kind in kinds}
        timed_turns: dict[Kind, list[Turn]] = {kind: [] for kind in timed}
        order = rng.sample(players, len(players))
        for kind, is_timed in (*order, *reversed(order)):
            calls = CallTimes() if is_timed else None
            (timed_turns if is_timed else turns)[kind].append(await take_turn(engine, kind, work, rng, calls))
        if number >= 0:
            rounds[0].append(turns)
            rounds[1].append(timed_turns)
            rates = ", ".join(f"{kind} {rate(found):.0f}" for kind, found in turns.items())
            progress(f"round {number + 1} of {num_rounds}, tokens/s: {rates}")
    return rounds


def rate(turns: Iterable[Turn]) -> float:
    """Tokens per second."""
    turns = list(turns)
    return sum(turn.tokens for turn in turns) / sum(turn.wall_s for turn in turns)


def cpu_us(turns: Iterable[Turn]) -> float:
    """Microseconds of the processor's time per token."""
    turns = list(turns)
    return 1e6 * sum(turn.cpu_s for turn in turns) / sum(turn.tokens for turn in turns)


def request_us(turns: Iterable[Turn]) -> float:
    """Microseconds that a request more takes."""
    turns = list(turns)
    return 1e6 * sum(turn.wall_s for turn in turns) / sum(len(turn.latencies_s) for turn in turns)


def tracing_us(turns: Iterable[Turn]) -> float:
    """Microseconds that the calls of a request and the SDK's threads take for it."""
    turns = list(turns)
    return 1e6 * sum(turn.calls_s + turn.threads_s for turn in turns) / sum(len(turn.latencies_s) for turn in turns)


def p99_ms(turns: Iterable[Turn]) -> float:
    return 1e3 * quantile((latency for turn in turns for latency in turn.latencies_s), 0.99)


class Measured(NamedTuple):
    """Rounds of each engine."""

    demo: list[Round]
    demo_timed: list[Round]
    demo_faults: list[Round]
    device_faults: list[Round]


class SteadyExecutor(FakeExecutor):
    """Always says the same."""

    def execute(self, step: StepInput) -> Future[StepOutput]:
        time.sleep(DEVICE_STEP_S)
        batch = step.batch
        decodes = [DecodeOutput(THE_TOKEN) for _ in batch.decodes]
        return finished(StepOutput(decodes, [PrefillOutput(THE_TOKEN if item.sample else None) for item in batch.prefills]))


def steady_engine(users: int) -> Runtime:
    config = build_config(None, None, {"scheduler": {"max_running_requests": users}})
    return Runtime(config, load=lambda config: fake_model(config, SteadyExecutor(config)))


async def run(args: argparse.Namespace) -> Measured:
    costs, faults = (Kind.UNTRACED, *COSTS), (Kind.SDK, *FAULTS)
    work = Work(args.requests, args.users, args.prompt_tokens, args.output_tokens)
    more = work._replace(requests=2 * args.requests)
    async with open_runtime(args.model, scheduler={"max_running_requests": args.users}) as engine:
        progress("the demo model")
        demo, demo_timed = await play(engine, costs, work, args.rounds, COSTS)
        demo_faults, _ = await play(engine, faults, more, args.latency_rounds)
    async with steady_engine(args.users) as engine:
        progress("a device of its own")
        device_faults, _ = await play(engine, faults, more, args.latency_rounds)
    return Measured(demo, demo_timed, demo_faults, device_faults)


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


def added(
    rounds: Sequence[Round], kinds: Iterable[Kind], over: Kind, figure: Callable[[Sequence[Turn]], float]
) -> dict[str, Spread]:
    """How much larger it is than that of ``over``, within each round, as a share."""
    return {kind.value: interval(figure(each[kind]) / figure(each[over]) - 1 for each in rounds) for kind in kinds}


def summarize(found: Measured) -> dict[str, Any]:
    demo_us = statistics.median(request_us(each[Kind.UNTRACED]) for each in found.demo)
    spent_us = of_all(found.demo_timed, tracing_us)
    share = {name: Spread(*(each / demo_us for each in us)) for name, us in spent_us.items()}
    device_p99_added = added(found.device_faults, FAULTS, Kind.SDK, p99_ms)
    return {
        "demo": {
            "tokens_per_s": of_all(found.demo, rate),
            "request_us": of_all(found.demo, request_us),
            "cpu_us_per_token": of_all(found.demo, cpu_us),
            "time_added": added(found.demo, COSTS, Kind.UNTRACED, request_us),
            "cpu_added": added(found.demo, COSTS, Kind.UNTRACED, cpu_us),
            "p99_ms": of_all(found.demo_faults, p99_ms),
            "p99_added": added(found.demo_faults, FAULTS, Kind.SDK, p99_ms),
        },
        "timed": {"tracing_us": spent_us, "share": share},
        "device": {"p99_ms": of_all(found.device_faults, p99_ms), "p99_added": device_p99_added},
        "bounds_met": {
            **{kind.value: share[kind.value].high <= bound for kind, bound in THROUGHPUT_BOUNDS.items()},
            **{kind.value: device_p99_added[kind.value].high <= P99_BOUND for kind in FAULTS},
        },
    }


def percent(share: Spread | None) -> str:
    return "" if share is None else Spread(*(100 * value for value in share)).show(2)


def show(results: Mapping[str, Any]) -> None:
    demo, timed, device = results["demo"], results["timed"], results["device"]
    print("Medians, and between which values they lie with 95 % confidence; shares are of the untraced demo model's time")
    rows = [
        [
            name,
            rates.show(0),
            percent(demo["time_added"].get(name)),
            percent(demo["cpu_added"].get(name)),
            timed["tracing_us"][name].show() if name in timed["share"] else "",
            percent(timed["share"].get(name)),
        ]
        for name, rates in demo["tokens_per_s"].items()
    ]
    header = ["", "tokens/s", "time added, %", "processor time added, %", "µs of a request in tracing", "their share, %"]
    print(table(header, rows))
    print("\nLatency of requests at p99, with exporters that fail")
    rows = [
        [
            name,
            demo["p99_ms"][name].show(),
            percent(demo["p99_added"].get(name)),
            device["p99_ms"][name].show(),
            percent(device["p99_added"].get(name)),
        ]
        for name in demo["p99_ms"]
    ]
    print(table(["", "demo model: ms", "added, %", "steady device: ms", "added, %"], rows))
    print("\nWithin the bounds:", ", ".join(f"{name} {met}" for name, met in results["bounds_met"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="What does tracing cost?")
    parser.add_argument("--rounds", type=int, default=40, help="of what tracing costs")
    parser.add_argument("--latency-rounds", type=int, default=40, help="with exporters that fail")
    parser.add_argument("--requests", type=int, default=32, help="of a turn; twice as many for latencies")
    parser.add_argument("--users", type=int, default=16, help="requests under way at a time")
    parser.add_argument("--prompt-tokens", type=int, default=202, help="ShareGPT's mean")
    parser.add_argument("--output-tokens", type=int, default=179, help="ShareGPT's mean")
    parser.add_argument("--model", help="by default the demo model")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = args.latency_rounds = 1
        args.requests = args.users = 2
        args.prompt_tokens, args.output_tokens = 8, 8
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # of exporters that fail there is nothing to tell
    facts = machine()
    found = anyio.run(run, args, backend_options={"use_uvloop": args.loop == "uvloop"})
    results = summarize(found)
    show(results)
    names = ("rounds", "latency_rounds", "requests", "users", "prompt_tokens", "output_tokens", "loop")
    settings = {"model": args.model or "demo", **{name: getattr(args, name) for name in names}}
    finish("tracing_cost", facts, settings, results)


if __name__ == "__main__":
    main()
