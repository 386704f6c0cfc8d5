"""What does a token cost outside the kernels?

The demo model on the CPU, with 1, 4 and 16 requests at once: the wall time of each token's step that is not spent in the
native call. That is all that Python does: planning, laying out, handing over between threads, detokenizing, streaming.
Once as the engine does it, with several rounds of decodes in a step; once with a single round in each.

    python -m bench.cpu_host [--batch 1 4 16] [--tokens 256] [--repeats 7] [--threads N]
"""

import argparse
import os
import time
from typing import NamedTuple
from unittest.mock import patch

import anyio

import ferrum_rt
from bench._common import Spread, finish, machine, progress, spread, table
from ferrum_rt.kernels.cpu import NativeOps, load_kernels
from ferrum_rt.kernels.cpu.program import BatchSizes, Program
from ferrum_rt.runtime.execution.step_runner import MAX_ROUNDS

GOAL_US = 300.0
PROMPT = [ord(letter) for letter in "def __init__(self"]


class Row(NamedTuple):
    """Of the table."""

    steps: str
    batch: int
    outside_us: Spread
    native_us: Spread


class Measured(NamedTuple):
    """Microseconds: outside the native calls for each step of a token, and inside for each round."""

    outside: float
    native: float


class Clock:
    """The time in native calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._run = NativeOps.run

    def run(self, ops: NativeOps, program: Program, sizes: BatchSizes, length: int | None = None) -> None:
        began = time.perf_counter()
        self._run(ops, program, sizes, length)
        self.seconds += time.perf_counter() - began


async def measure(max_rounds: int, args: argparse.Namespace) -> dict[int, list[Measured]]:
    found: dict[int, list[Measured]] = {batch: [] for batch in args.batch}
    clock = Clock()
    with (
        patch("ferrum_rt.runtime.execution.executor.MAX_ROUNDS", max_rounds),
        patch.object(NativeOps, "run", lambda *call: clock.run(*call)),
    ):
        async with ferrum_rt.open_runtime(
            backend={"num_threads": args.threads}, scheduler={"max_running_requests": max(args.batch)}
        ) as engine:
            for repeat in range(args.repeats + 1):
                for batch in args.batch:
                    clock.seconds, began = 0.0, time.perf_counter()
                    await engine.infer_batch([PROMPT] * batch, max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
                    wall = time.perf_counter() - began
                    if repeat:  # the first is for warming up
                        scale = 1e6 / args.tokens
                        found[batch].append(Measured((wall - clock.seconds) * scale, clock.seconds * scale))
                progress(f"up to {max_rounds} rounds: {repeat} of {args.repeats} repeats")
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What does a token cost outside the kernels?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=256, help="of each request")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.tokens, args.repeats = [1, 2], 32, 1
    return args


def main() -> None:
    args = parse_arguments()
    if load_kernels() is None:
        raise SystemExit("there is no C++ compiler, so there is no native call to measure")
    facts = machine()
    rows = []
    for name, max_rounds in (("in rounds", MAX_ROUNDS), ("one by one", 1)):
        found = anyio.run(measure, max_rounds, args, backend_options={"use_uvloop": args.loop == "uvloop"})
        for batch, taken in found.items():
            outside, native = (spread(getattr(item, field) for item in taken) for field in Measured._fields)
            rows.append(Row(name, batch, outside, native))
    print(
        f"Microseconds for a step of a token, goal {GOAL_US:.0f} at batch 1; of {args.repeats} repeats median (low to high)"
    )
    lines = [[row.steps, row.batch, row.outside_us.show(), row.native_us.show()] for row in rows]
    print(table(["steps", "batch", "outside the kernels", "in them"], lines))
    names = ("tokens", "repeats", "threads", "loop")
    finish("cpu_host", facts, {name: getattr(args, name) for name in names}, {"results": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
