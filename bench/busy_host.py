"""Does a busy host starve the engine, and does the engine get in the host's way?

The engine shares its process, its event loop and above all the GIL with the application around it. Here that application
is one of three: *idle*; *half busy*, a task on the same loop that burns 2 ms of pure Python and sleeps for 2 ms, again and
again; or *spinning*, a thread of pure Python that never gives up the GIL of its own accord. Beside each of them are measured

- the engine's throughput with 4 and with 16 requests running, and how much of the idle host's it keeps;
- how late the host's own 1 ms sleeps end, with the engine running and without it (where it is not, what one sees is the
  host's own load and the timers' resolution).

What is in question is the GIL and not who gets the cores, so the engine computes with one thread less than there are
cores. The design asks for at least 90 % beside the half-busy host, and for at most 2 ms of delay at p99.

    python -m bench.busy_host [--batch 4 16] [--seconds 3] [--repeats 5] [--temperature 0.8] [--dtype float32]
                              [--threads N] [--model DIRECTORY | --dummy DIRECTORY_WITH_A_CONFIG_JSON]
"""

import argparse
import enum
import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import anyio

import ferrum_rt
from bench._common import TINY, finish, limit_threads, machine, progress, quantile, qwen3_config, spread, table

SLICE_S = 0.002
TICK_S = 0.001
NUM_PROMPT_TOKENS = 16
MAX_OUTPUT_TOKENS = 256


class Host(enum.StrEnum):
    """What the application does beside the engine."""

    IDLE = "idle"
    HALF_BUSY = "half busy"
    SPINNING = "spinning"


@asynccontextmanager
async def host_load(host: Host) -> AsyncIterator[None]:
    match host:
        case Host.IDLE:
            yield
        case Host.HALF_BUSY:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_burn_slices)
                yield
                tasks.cancel_scope.cancel()
        case Host.SPINNING:
            stopped = threading.Event()
            thread = threading.Thread(target=_spin, args=(stopped,))
            thread.start()
            try:
                yield
            finally:
                stopped.set()
                thread.join()


async def _burn_slices() -> None:
    while True:
        _burn(SLICE_S)
        await anyio.sleep(SLICE_S)


def _burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _spin(stopped: threading.Event) -> None:
    while not stopped.is_set():
        pass


class Load:
    """``batch`` readers that always have a request running; counts the tokens they get."""

    def __init__(
        self, engine: ferrum_rt.InferenceEngine, batch: int, vocab_size: int, max_tokens: int, temperature: float
    ) -> None:
        self.num_tokens = 0
        self._engine, self._batch = engine, batch
        self._vocab_size, self._max_tokens, self._temperature = vocab_size, max_tokens, temperature

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            for reader in range(self._batch):
                tasks.start_soon(self._read, random.Random(reader))
            yield
            tasks.cancel_scope.cancel()

    async def _read(self, rng: random.Random) -> None:
        while True:
            prompt = [rng.randrange(self._vocab_size) for _ in range(NUM_PROMPT_TOKENS)]
            async with self._engine.infer_stream(
                prompt, max_tokens=self._max_tokens, temperature=self._temperature, ignore_eos=True
            ) as chunks:
                async for chunk in chunks:
                    self.num_tokens += len(chunk.token_ids)


async def throughput(load: Load, seconds: float) -> float:
    """Tokens per second."""
    before, began = load.num_tokens, time.perf_counter()
    await anyio.sleep(seconds)
    return (load.num_tokens - before) / (time.perf_counter() - began)


async def loop_delays(seconds: float) -> list[float]:
    """How late each sleep of 1 ms ended, in milliseconds."""
    delays = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await anyio.sleep(TICK_S)
        delays.append(1e3 * (time.perf_counter() - began - TICK_S))
    return delays


class Case(NamedTuple):
    """``batch`` 0 is without the engine."""

    host: Host
    batch: int


class Delay(NamedTuple):
    """Milliseconds."""

    p50: float
    p99: float
    max: float


@dataclass
class Samples:
    """One figure for each repeat."""

    tokens_per_s: dict[Case, list[float]] = field(default_factory=dict)
    delays: dict[Case, list[Delay]] = field(default_factory=dict)


async def measure_all(engine: ferrum_rt.InferenceEngine, args: argparse.Namespace) -> Samples:
    info = (await engine.status()).model
    if info is None:
        raise RuntimeError("the engine has no model")
    max_tokens = min(MAX_OUTPUT_TOKENS, info.max_model_len - NUM_PROMPT_TOKENS)
    cases = [Case(host, batch) for batch in (0, *args.batch) for host in Host]
    samples = Samples({case: [] for case in cases if case.batch}, {case: [] for case in cases})
    for repeat, case in itertools.product(range(args.repeats), cases):
        load = Load(engine, case.batch, info.vocab_size, max_tokens, args.temperature)
        async with host_load(case.host), load.running():
            await anyio.sleep(args.warm_up)
            # One after the other: the ticks are a load too.
            if case.batch:
                samples.tokens_per_s[case].append(await throughput(load, args.seconds))
            delays = await loop_delays(args.seconds)
        samples.delays[case].append(Delay(quantile(delays, 0.5), quantile(delays, 0.99), max(delays)))
        progress(f"repeat {repeat + 1} of {args.repeats}: {case.host} host, batch {case.batch}")
    return samples


def summarize(samples: Samples) -> dict[str, list[dict[str, Any]]]:
    """Ratios and differences are taken within each repeat."""
    rates = [
        {
            "host": case.host,
            "batch": case.batch,
            "tokens_per_s": spread(values),
            "share_of_idle": spread(
                mine / idle for mine, idle in zip(values, samples.tokens_per_s[Case(Host.IDLE, case.batch)], strict=True)
            ),
        }
        for case, values in samples.tokens_per_s.items()
    ]
    delays = [
        {
            "host": case.host,
            "batch": case.batch,
            **{name: spread(getattr(value, name) for value in values) for name in Delay._fields},
            "p99_added": spread(
                mine.p99 - without.p99 for mine, without in zip(values, samples.delays[Case(case.host, 0)], strict=True)
            ),
        }
        for case, values in samples.delays.items()
    ]
    return {"throughput": rates, "loop_delay_ms": delays}


def show(results: dict[str, list[dict[str, Any]]], repeats: int) -> None:
    print(f"Tokens per second: median (low to high) of {repeats} repeats")
    rows: Sequence[Sequence[object]] = [
        [row["host"], row["batch"], row["tokens_per_s"].show(), row["share_of_idle"].show(2)]
        for row in results["throughput"]
    ]
    print(table(["host", "batch", "tokens/s", "share of idle host's"], rows))
    print("\nDelay of the host's own event loop in ms: median (low to high) over the repeats")
    rows = [
        [row["host"], row["batch"] or "no engine", *(row[name].show(2) for name in (*Delay._fields, "p99_added"))]
        for row in results["loop_delay_ms"]
    ]
    print(table(["host", "batch", "p50", "p99", "max", "p99 added by the engine"], rows))


async def run(args: argparse.Namespace, model: Path | None) -> Samples:
    async with ferrum_rt.open_runtime(
        model,
        dtype=args.dtype,
        load_format="dummy" if args.dummy else "auto",
        scheduler={"max_running_requests": max(args.batch)},
        max_model_len=NUM_PROMPT_TOKENS + MAX_OUTPUT_TOKENS,
    ) as engine:
        return await measure_all(engine, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Does a busy host starve the engine, or the engine delay the host?")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=0.5, help="seconds before it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="by default the checkpoint's")
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="for the engine")
    parser.add_argument("--model", type=Path, help="by default the demo model")
    parser.add_argument("--dummy", type=Path, help="a directory with a config.json, to run it with random weights")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.seconds, args.warm_up, args.repeats = [2], 0.1, 0.05, 1
    return args


def main() -> None:
    args = parse_arguments()
    limit_threads(args.threads)
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="ferrum-bench-") as directory:
        if args.smoke:
            args.dummy = Path(directory)
            (args.dummy / "config.json").write_text(json.dumps(qwen3_config(**TINY)))
        model = args.dummy or args.model
        samples = anyio.run(run, args, model, backend_options={"use_uvloop": args.loop == "uvloop"})

    results = summarize(samples)
    show(results, args.repeats)
    names = ("seconds", "repeats", "temperature", "threads", "dtype", "loop")
    settings = {"model": str(model or "demo"), **{name: getattr(args, name) for name in names}}
    finish("busy_host", facts, settings, results)


if __name__ == "__main__":
    main()
