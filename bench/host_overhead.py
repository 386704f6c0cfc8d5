"""What does a step cost the host's event loop?

The real Runtime runs over a fake executor that computes next to nothing, with N readers that each iterate over an
infer_stream, as users do. Measured is the steady state, from when every reader has had a chunk until the first one ends:
the CPU time of the event loop's thread for each step (everything that is done on the loop: plan, commit, decoding the
text, handing out the chunks, and the readers' own loops), the wall time for each step, and how much of it is the
scheduler (plan and commit). The fake's own time per step is shown beside: it runs in a thread of its own but holds the
GIL. Text is made by a tokenizer of bytes in Python.

    python -m bench.host_overhead [--batch 1 32 256] [--repeats 7] [--steps 400] [--loop uvloop|asyncio]
"""

import argparse
import time
from functools import partial
from typing import NamedTuple

import anyio

from bench._common import finish, machine, progress, spread, table
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.types import EngineMetrics
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.executor import fake_model

NUM_PROMPT_TOKENS = 16


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
    async with engine.infer_stream(prompt, max_tokens=steps, ignore_eos=True, temperature=0.0) as chunks:
        async for _ in chunks:
            if not has_started:
                has_started = True
                window.reader_started()
    window.reader_finished()


async def measure(batch: int, steps: int) -> PerStep:
    config = build_config(
        None,
        None,
        {
            "scheduler": {"max_running_requests": batch},
            "batching": {"max_batched_tokens": max(512, 2 * batch)},
            "max_model_len": NUM_PROMPT_TOKENS + steps,
        },
    )
    async with Runtime(config, load=fake_model) as engine:
        window = Window(engine, batch)
        async with anyio.create_task_group() as readers:
            for reader in range(batch):
                readers.start_soon(read, engine, window, reader, steps)
        return window.per_step()


def main() -> None:
    parser = argparse.ArgumentParser(description="What does a step cost the host's event loop?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400, help="tokens that each reader gets")
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.repeats, args.steps = [1, 4], 1, 30

    facts = machine()
    samples: dict[int, list[PerStep]] = {batch: [] for batch in args.batch}
    for repeat in range(args.repeats):
        for batch in args.batch:
            run = partial(measure, batch, args.steps)
            samples[batch].append(anyio.run(run, backend_options={"use_uvloop": args.loop == "uvloop"}))
            progress(f"repeat {repeat + 1} of {args.repeats}, batch {batch}: {samples[batch][-1].loop:.0f} µs of the loop")

    spreads = {
        batch: {field: spread(getattr(sample, field) for sample in taken) for field in PerStep._fields}
        for batch, taken in samples.items()
    }
    print(f"Microseconds per step: median (low to high) of {args.repeats} repeats")
    print(
        table(
            ["batch", "loop thread CPU", "of it per request", "plan + commit", "wall", "fake executor"],
            [
                [
                    batch,
                    found["loop"].show(),
                    f"{found['loop'].median / batch:.2f}",
                    found["scheduler"].show(),
                    found["wall"].show(),
                    found["executor"].show(),
                ]
                for batch, found in spreads.items()
            ],
        )
    )
    finish(
        "host_overhead",
        facts,
        {"steps": args.steps, "repeats": args.repeats, "loop": args.loop, "prompt_tokens": NUM_PROMPT_TOKENS},
        {"us_per_step": [{"batch": batch, **found} for batch, found in spreads.items()]},
    )


if __name__ == "__main__":
    main()
