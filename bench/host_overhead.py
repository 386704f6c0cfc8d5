"""What does a step cost the host's event loop?

The real Runtime runs over a fake executor that computes next to nothing, with N readers that each iterate over an
infer_stream, as users do. Measured is the steady state, from when every reader has had a chunk until the first one ends:
the CPU time of the event loop's thread for each step (everything that is done on the loop: plan, commit, decoding the
text, handing out the chunks, and the readers' own loops), the wall time for each step, and how much of it is the
scheduler (plan and commit). The fake's own time per step is shown beside: it runs in a thread of its own but holds the
GIL. Text is made by a tokenizer of bytes in Python. The readers are eight clients, so that all policies of the scheduler
have something to do; beside it runs a scheduler without any (bench/_first_come.py), in turns.

*Waiting*: what a plan takes while so many requests wait, of 64 clients and all priorities, beside 32 that run: most of them
have no part in it.

    python -m bench.host_overhead [--batch 1 32 256] [--waiting 100 10000] [--repeats 7] [--steps 400]
"""

import argparse
import random
import time
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import anyio

from bench._common import finish, machine, progress, spread, table
from bench._first_come import FirstComeScheduler
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchHint, SequenceRequest
from ferrum_rt.interfaces.types import ClientId, EngineMetrics, Priority, RequestId, TokenId
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from tests.fakes.executor import FakeExecutor, fake_model

NUM_PROMPT_TOKENS = 16
NUM_CLIENTS = 8
NUM_RUNNING = 32
GOAL = 1.15
SCHEDULERS = {"all policies": UnifiedScheduler, "first come": FirstComeScheduler}


class PerStep(NamedTuple):
    """Microseconds."""

    loop: float
    wall: float
    scheduler: float
    executor: float


class Window:
    """The steady state: opened when every reader has had its first chunk, closed when the first one has its last."""

    def __init__(self, engine: Runtime, readers: int) -> None:
        self._engine = engine
        self._missing = readers
        self._begin: tuple[float, float, EngineMetrics] | None = None
        self._end: tuple[float, float, EngineMetrics] | None = None

    def reader_started(self) -> None:
        self._missing -= 1
        if not self._missing:
            self._begin = self._now()

    def reader_finished(self) -> None:
        self._end = self._end or self._now()

    def per_step(self) -> PerStep:
        if self._begin is None or self._end is None:
            raise RuntimeError("the readers never ran all at once; give them more --steps")
        (cpu, wall, before), (cpu_end, wall_end, after) = self._begin, self._end
        scale = 1e6 / (after.steps - before.steps)
        return PerStep(
            loop=scale * (cpu_end - cpu),
            wall=scale * (wall_end - wall),
            scheduler=scale * (after.host_s - before.host_s),
            executor=scale * (after.step_s - before.step_s),
        )

    def _now(self) -> tuple[float, float, EngineMetrics]:
        return time.thread_time(), time.perf_counter(), self._engine.metrics()


async def read(engine: Runtime, window: Window, reader: int, steps: int) -> None:
    prompt = [reader % 256] * NUM_PROMPT_TOKENS
    has_started = False
    client_id = ClientId(f"client {reader % NUM_CLIENTS}")
    async with engine.infer_stream(
        prompt, max_tokens=steps, ignore_eos=True, temperature=0.0, client_id=client_id
    ) as chunks:
        async for _ in chunks:
            if not has_started:
                has_started = True
                window.reader_started()
    window.reader_finished()


async def measure(scheduler: str, batch: int, steps: int) -> PerStep:
    config = build_config(
        None,
        None,
        {
            "scheduler": {"max_running_requests": batch},
            "batching": {"max_batched_tokens": max(512, 2 * batch)},
            "max_model_len": NUM_PROMPT_TOKENS + steps,
        },
    )
    with patch("ferrum_rt.runtime.runtime.UnifiedScheduler", SCHEDULERS[scheduler]):
        return await _steady(Runtime(config, load=fake_model), batch, steps)


async def _steady(runtime: Runtime, batch: int, steps: int) -> PerStep:
    async with runtime as engine:
        window = Window(engine, batch)
        async with anyio.create_task_group() as readers:
            for reader in range(batch):
                readers.start_soon(read, engine, window, reader, steps)
        return window.per_step()


def time_plans(num_waiting: int, steps: int) -> float:
    """Microseconds for plan and commit, the mean of ``steps``, while so many requests wait."""
    generator = random.Random(num_waiting)
    config = build_config(
        None,
        None,
        {
            "scheduler": {"max_running_requests": NUM_RUNNING, "max_waiting_requests": num_waiting + 1},
            "kv_cache": {"num_pages": 4 * NUM_RUNNING},
        },
    )
    cache = PagedKvCache(4 * NUM_RUNNING, config.kv_cache.block_size)
    executor = FakeExecutor(config)
    scheduler = UnifiedScheduler(cache, num_slots=NUM_RUNNING, max_model_len=64, config=config.scheduler)
    for number in range(num_waiting + NUM_RUNNING):
        scheduler.submit(
            SequenceRequest(
                request_id=RequestId(f"{number}"),
                token_ids=[TokenId(generator.randrange(256)) for _ in range(NUM_PROMPT_TOKENS)],
                max_tokens=40,
                sampling=SamplingConfig(),
                client_id=ClientId(f"client {number % 64}"),
                priority=generator.choice(list(Priority)),
            )
        )
    spent = 0.0
    for _ in range(steps):
        began = time.perf_counter()
        plan = scheduler.plan(BatchHint(now=0.0, max_tokens=512))
        spent += time.perf_counter() - began
        assert plan is not None
        output = executor.execute(plan.step).result()
        began = time.perf_counter()
        scheduler.commit(plan, output, 0.001)
        spent += time.perf_counter() - began
    return 1e6 * spent / steps


def main() -> None:
    parser = argparse.ArgumentParser(description="What does a step cost the host's event loop?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--waiting", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400, help="tokens that each reader gets")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.waiting, args.repeats, args.steps = [1, 4], [10, 100], 1, 30

    facts = machine()
    samples: dict[tuple[int, str], list[PerStep]] = {(batch, name): [] for batch in args.batch for name in SCHEDULERS}
    waiting: dict[int, list[float]] = {count: [] for count in args.waiting}
    for repeat in range(args.repeats):
        for (batch, name), taken in samples.items():
            run = partial(measure, name, batch, args.steps)
            taken.append(anyio.run(run, backend_options={"use_uvloop": args.loop == "uvloop"}))
            progress(f"repeat {repeat + 1} of {args.repeats}, batch {batch}, {name}: {taken[-1].loop:.0f} µs of the loop")
        for count, times in waiting.items():
            times.append(time_plans(count, args.steps // 2))
    report(args, facts, samples, waiting)


def report(
    args: argparse.Namespace,
    facts: dict[str, Any],
    samples: dict[tuple[int, str], list[PerStep]],
    waiting: dict[int, list[float]],
) -> None:
    spreads = {
        key: {field: spread(getattr(sample, field) for sample in taken) for field in PerStep._fields}
        for key, taken in samples.items()
    }
    ratios = {
        batch: spread(
            ours.loop / theirs.loop
            for ours, theirs in zip(samples[batch, "all policies"], samples[batch, "first come"], strict=True)
        )
        for batch in args.batch
    }
    print(f"Microseconds per step: median (low to high) of {args.repeats} repeats")
    header = ["batch", "scheduler", "loop thread CPU", "of it per request", "plan + commit", "wall", "fake executor"]
    lines = [
        [
            batch,
            name,
            found["loop"].show(),
            f"{found['loop'].median / batch:.2f}",
            found["scheduler"].show(),
            found["wall"].show(),
            found["executor"].show(),
        ]
        for (batch, name), found in spreads.items()
    ]
    print(table(header, lines))
    print(f"\nThe loop's time with all policies, in times of that without (goal: at most {GOAL})")
    print(table(["batch", "ratio"], [[batch, ratio.show(2)] for batch, ratio in ratios.items()]))
    plans = {count: spread(times) for count, times in waiting.items()}
    print(f"\nPlan and commit beside {NUM_RUNNING} that run, microseconds")
    print(table(["waiting", "per step"], [[count, found.show(0)] for count, found in plans.items()]))
    finish(
        "host_overhead",
        facts,
        {"steps": args.steps, "repeats": args.repeats, "loop": args.loop, "prompt_tokens": NUM_PROMPT_TOKENS},
        {
            "us_per_step": [
                {"batch": batch, "policies": name == "all policies", **found} for (batch, name), found in spreads.items()
            ],
            "ratio": [{"batch": batch, "loop": ratio} for batch, ratio in ratios.items()],
            "waiting": [{"requests": count, "us_per_step": found} for count, found in plans.items()],
        },
    )


if __name__ == "__main__":
    main()
