"""Prove the scheduler on random seeds, on all cores.

    python -m tools.simulate_seeds --seeds 1000000

lives that many seeds of ferrum_rt.runtime.simulation.seeds, from --start on, and prints each that violates an invariant, and
how to see it again:

    python -m tools.simulate_seeds --replay 17

prints everything that goes into the scheduler and comes out of it with seed 17. Every --again-th seed is lived twice, and
must give the same events. The last line of standard output is JSON; the exit status is 1 if anything was violated.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from ferrum_rt.runtime.simulation.seeds import run_seed
from ferrum_rt.runtime.simulation.violation import Violation

CHUNK = 50
MAX_VIOLATIONS = 10
PROGRESS_S = 1.0


class Part(NamedTuple):
    """Consecutive seeds, for one process to live."""

    seeds: range
    again: int
    max_wait_steps: int | None


class Tally(NamedTuple):
    """What came of a part. ``longest_wait`` is in steps."""

    seeds: int
    steps: int
    longest_wait: int
    violations: list[str]


def live(part: Part) -> Tally:
    steps = longest_wait = 0
    violations = []
    for seed in part.seeds:
        try:
            outcome = run_seed(seed, max_wait_steps=part.max_wait_steps, again=seed % part.again == 0)
        except Violation as violation:
            violations.append(str(violation))
            continue
        steps += outcome.steps
        longest_wait = max(longest_wait, outcome.longest_wait)
    return Tally(len(part.seeds), steps, longest_wait, violations)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    max_wait_steps = arguments.max_wait_steps
    if arguments.replay is not None:
        return replay(arguments.replay, max_wait_steps)
    chunks = range(arguments.start, arguments.start + arguments.seeds, CHUNK)
    end = arguments.start + arguments.seeds
    parts = [Part(range(start, min(start + CHUNK, end)), arguments.again, max_wait_steps) for start in chunks]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        total = collect(pool.imap_unordered(live, parts), arguments.seeds, max_wait_steps)
    seconds = time.perf_counter() - began
    report = {
        "seeds": total.seeds,
        "start": arguments.start,
        "steps": total.steps,
        "violations": len(total.violations),
        "longest_wait_steps": total.longest_wait,
        "processes": arguments.processes,
        "seconds": round(seconds, 1),
        "seeds_per_s": round(total.seeds / seconds, 1),
    }
    print(json.dumps(report))
    return 1 if total.violations else 0


def collect(tallies: Iterable[Tally], num_seeds: int, max_wait_steps: int | None) -> Tally:
    """Add them up, with a line of progress, and print the first violations as they come."""
    began = said = time.perf_counter()
    seeds = steps = longest_wait = 0
    violations: list[str] = []
    options = "" if max_wait_steps is None else f" --max-wait-steps {max_wait_steps}"
    for tally in tallies:
        seeds, steps = seeds + tally.seeds, steps + tally.steps
        longest_wait = max(longest_wait, tally.longest_wait)
        for violation in tally.violations[: MAX_VIOLATIONS - len(violations)]:
            seed = violation.split()[1].rstrip(",")
            print(f"{violation}\n    python -m tools.simulate_seeds --replay {seed}{options}", flush=True)
        violations += tally.violations
        now = time.perf_counter()
        if now - said > PROGRESS_S or seeds == num_seeds:
            said = now
            rate = f"{seeds / (now - began):.0f} seeds/s"
            print(f"{seeds:,} of {num_seeds:,} seeds, {rate}, {len(violations)} violations", file=sys.stderr, flush=True)
    return Tally(seeds, steps, longest_wait, violations)


def replay(seed: int, max_wait_steps: int | None) -> int:
    """One seed, line by line."""
    try:
        outcome = run_seed(seed, max_wait_steps=max_wait_steps, say=print)
    except Violation as violation:
        print(violation)
        return 1
    print(f"seed {seed}: {outcome.steps} steps, nothing violated, log {outcome.log}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simulate_seeds", description="Prove the scheduler on random seeds.")
    parser.add_argument("--seeds", metavar="N", type=int, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--start", metavar="SEED", type=int, default=0, help="the first one")
    parser.add_argument(
        "--processes", metavar="N", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument(
        "--again", metavar="N", type=int, default=20, help="live every N-th seed twice (default: %(default)s)"
    )
    parser.add_argument("--max-wait-steps", metavar="N", type=int, help="nobody may wait longer; no bound if left out")
    parser.add_argument("--replay", metavar="SEED", type=int, help="live this one alone, and say everything")
    return parser


if __name__ == "__main__":
    sys.exit(main())
