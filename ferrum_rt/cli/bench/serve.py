"""ferrum-rt bench serve and sweep: a load is put on an engine, a daemon or a server, and what its users met is reported."""

import argparse
import gc
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
import msgspec
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from ferrum_rt.cli.bench.load import (
    check_numbers,
    described,
    described_sweep,
    read_limits,
    read_load,
    seeds_of,
    sweep_load,
)
from ferrum_rt.cli.bench.output import Progress, load_as_text, sweep_as_text
from ferrum_rt.cli.bench.report import check_report, write_report_files
from ferrum_rt.cli.bench.target import OpenTarget, check_target, is_in_this_process, open_target
from ferrum_rt.cli.machine import machine
from ferrum_rt.load.driver import put_on
from ferrum_rt.load.measures import summarize
from ferrum_rt.load.results import Limits, LoadResult, Repeat, Summary, SweepResult
from ferrum_rt.load.spans import SpanRecorder, num_untraced, with_spans
from ferrum_rt.load.sweep import sweep
from ferrum_rt.load.workload import Load, LoadRequest

WARMUP_CONCURRENCY = 4
_Result = TypeVar("_Result", LoadResult, SweepResult)
LEAST_REQUESTS = 5  # of a rate of a sweep: of fewer no share can be told


def bench_serve(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if no request came to its end. Raises UsageError and ConfigError before anything is opened,
    and what opening it raises."""
    result = _measure(_serve, read_load, arguments)
    print(_as_json(result) if arguments.json else load_as_text(result))
    return 0 if result.summary.completed else 1


def bench_sweep(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if no rate met the limits. Raises as ``bench_serve`` does."""
    result = _measure(_sweep, sweep_load, arguments)
    print(msgspec.json.encode(result).decode() if arguments.json else sweep_as_text(result))
    return 1 if result.highest_rate is None else 0


def _measure(
    measure: Callable[[argparse.Namespace, Load, Limits, Progress], Awaitable[_Result]],
    load_of: Callable[[argparse.Namespace], Load],
    arguments: argparse.Namespace,
) -> _Result:
    """Whatever is wrong with the options is said first; at the end the report's files are there."""
    check_numbers(arguments)
    check_target(arguments)
    check_report(arguments)
    load, limits = load_of(arguments), read_limits(arguments)
    with Progress() as progress:
        result = anyio.run(measure, arguments, load, limits, progress, backend_options={"use_uvloop": True})
    write_report_files(result, arguments)
    return result


def _as_json(result: LoadResult) -> str:
    """Without what there is one of for each request."""
    bare = [msgspec.structs.replace(repeat, requests=[], samples=[], spans=[]) for repeat in result.repeats]
    return msgspec.json.encode(msgspec.structs.replace(result, repeats=bare)).decode()


async def _serve(arguments: argparse.Namespace, load: Load, limits: Limits, progress: Progress) -> LoadResult:
    facts = machine()
    # Of another server nobody would read them.
    recorder = record_spans() if is_in_this_process(arguments) or arguments.spans is not None else None
    async with open_target(arguments) as opened:
        await _warm_up(opened, load, arguments, progress)
        repeats = []
        for number, seed in enumerate(seeds_of(arguments), start=1):
            requests = _draw(opened, load, seed)
            progress.begin(f"repeat {number}/{arguments.repeats}", len(requests))
            repeats.append(await _run(opened, requests, load.concurrency, progress, recorder))
        if arguments.spans is not None:
            from ferrum_rt.cli.bench.spans import with_spans_of_daemon

            repeats = await with_spans_of_daemon(arguments.spans, repeats)
    lost = 0 if recorder is None else sum(num_untraced(repeat.requests, repeat.spans) for repeat in repeats)
    return LoadResult(
        target=opened.name,
        load=described(arguments, load),
        machine=facts,
        limits=limits,
        summary=summarize(repeats, limits, spans_dropped=lost),
        repeats=repeats,
    )


async def _sweep(arguments: argparse.Namespace, load: Load, limits: Limits, progress: Progress) -> SweepResult:
    facts, seeds = machine(), itertools.count(arguments.seed)
    async with open_target(arguments) as opened:
        await _warm_up(opened, load, arguments, progress)

        async def measure(rate: float) -> Summary:
            at_rate = msgspec.structs.replace(load, rate=rate, requests=max(1, round(rate * arguments.duration)))
            requests = _draw(opened, at_rate, next(seeds))  # the same prompts again would be in the prefix cache
            progress.begin(f"{rate:.3g} requests/s", len(requests))
            return summarize([await _run(opened, requests, load.concurrency, progress, None)], limits)

        highest, points = await sweep(
            measure, begin=arguments.begin, required_share=arguments.share, least=LEAST_REQUESTS / arguments.duration
        )
    return SweepResult(
        target=opened.name,
        load=described_sweep(arguments, load),
        machine=facts,
        limits=limits,
        required_share=arguments.share,
        highest_rate=highest,
        points=points,
    )


def record_spans() -> SpanRecorder:
    """Every span of this process, which is ours, from here on, with all its events and links."""
    recorder, unlimited = SpanRecorder(), SpanLimits.UNSET
    limits = SpanLimits(max_events=unlimited, max_links=unlimited)
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False, span_limits=limits)
    provider.add_span_processor(recorder)
    trace.set_tracer_provider(provider)
    return recorder


def _draw(opened: OpenTarget, load: Load, seed: int) -> list[LoadRequest]:
    return load.draw(seed, vocabulary=opened.vocabulary, max_model_len=opened.max_model_len)


async def _warm_up(opened: OpenTarget, load: Load, arguments: argparse.Namespace, progress: Progress) -> None:
    """Requests of the load's kind that nobody counts: what is slow once is not to be measured."""
    if not arguments.warmup:
        return
    drawn = _draw(opened, msgspec.structs.replace(load, requests=arguments.warmup), arguments.seed - 1)
    requests = [msgspec.structs.replace(request, due_s=None) for request in drawn[: arguments.warmup]]
    progress.begin("warm-up", len(requests))
    await put_on(opened.target, requests, concurrency=WARMUP_CONCURRENCY, on_end=progress.ended)


async def _run(
    opened: OpenTarget,
    requests: Sequence[LoadRequest],
    concurrency: int,
    progress: Progress,
    recorder: SpanRecorder | None,
) -> Repeat:
    if recorder is not None:
        recorder.take()  # of the warm-up
    # What is there already is not walked again and again by the garbage collector while the load is on.
    gc.collect()
    gc.freeze()
    try:
        repeat = await put_on(opened.target, requests, concurrency=concurrency, on_end=progress.ended)
    finally:
        gc.unfreeze()
    return repeat if recorder is None else with_spans(repeat, recorder.take())
