"""The threads of the native kernels: where they run, and that nothing hangs on how many there are."""

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ferrum_rt.kernels.cpu import NativeOps, load_kernels
from ferrum_rt.kernels.cpu.build import Kernels
from ferrum_rt.kernels.cpu.program import BatchSizes, Program, Rows

ROOT = Path(__file__).parents[2]
IN, OUT, ROWS = 64, 4096, 8
needs_two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if loaded is None:
        pytest.skip("needs a C++ compiler")
    return loaded


@pytest.fixture
def caller() -> Iterator[ThreadPoolExecutor]:
    """A thread whose affinity a test may change."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Layer:
    """A multiplication in several chunks, and what it must come to."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randint(-4, 5, (ROWS, IN), generator=generator).float()
        self.weight = torch.randint(-4, 5, (OUT, IN), generator=generator).float()
        self.expected = self.x @ self.weight.T

    def is_right(self, ops: NativeOps) -> bool:
        out = torch.zeros(ROWS, OUT)
        ops.linear(out, self.x, ops.pack_linear(self.weight, None))
        return torch.equal(out, self.expected)


def opened(kernels: Kernels, num_threads: int) -> tuple[NativeOps, list[int]]:
    """With the ids of its helpers."""
    before = set(os.listdir("/proc/self/task"))
    ops = NativeOps(kernels, num_threads)
    return ops, [int(task) for task in set(os.listdir("/proc/self/task")) - before]


def wait_for_threads(count: int) -> int:
    """How many there are: ``count``, or too many. One that has been joined may be listed for a moment longer."""
    end = time.monotonic() + 10
    while (found := len(os.listdir("/proc/self/task"))) > count and time.monotonic() < end:
        os.sched_yield()
    return found


def affinities(threads: list[int]) -> list[set[int]]:
    return [os.sched_getaffinity(thread) for thread in threads]


def test_closing_ends_the_threads(kernels: Kernels) -> None:
    """A pool's threads are there while it is open, and gone when it has been closed, also twice."""
    before = len(os.listdir("/proc/self/task"))
    ops, helpers = opened(kernels, 4)
    assert len(helpers) == 3
    ops.close()
    ops.close()
    assert wait_for_threads(before) <= before


@needs_two_cpus
def test_helpers_leave_the_callers_cpu(kernels: Kernels) -> None:
    """They may run wherever the process may but where the thread is that calls, whose own affinity stays."""
    allowed, current_cpu = os.sched_getaffinity(0), ctypes.CDLL(None).sched_getcpu
    ops, helpers = opened(kernels, 2)
    layer = Layer()
    try:
        for _ in range(1000):
            before = current_cpu()
            assert layer.is_right(ops)
            given = affinities(helpers)
            assert os.sched_getaffinity(0) == allowed
            if before == current_cpu():  # else it was moved meanwhile: nobody knows where it was at the start
                break
        assert given == [allowed - {before}]
    finally:
        ops.close()


@needs_two_cpus
def test_helpers_follow_the_callers_affinity(kernels: Kernels, caller: ThreadPoolExecutor) -> None:
    """A thread that may use one CPU has its helpers there too, for they must be somewhere; later they may leave it again."""
    allowed = os.sched_getaffinity(0)
    ops, helpers = opened(kernels, 2)
    layer = Layer()
    try:
        for cpu in sorted(allowed)[:2]:
            caller.submit(os.sched_setaffinity, 0, {cpu}).result()
            assert caller.submit(layer.is_right, ops).result()
            assert affinities(helpers) == [{cpu}]
        caller.submit(os.sched_setaffinity, 0, allowed).result()
        assert caller.submit(layer.is_right, ops).result()
        assert [len(given) for given in affinities(helpers)] == [len(allowed) - 1]
    finally:
        ops.close()


def test_more_threads_than_cpus(kernels: Kernels) -> None:
    """No helper is kept off any CPU, and the result is the same."""
    allowed = os.sched_getaffinity(0)
    ops, helpers = opened(kernels, len(allowed) + 2)
    layer = Layer()
    try:
        assert all(layer.is_right(ops) for _ in range(20))
        assert affinities(helpers) == [allowed] * (len(allowed) + 1)
    finally:
        ops.close()


def test_any_thread_may_call(kernels: Kernels) -> None:
    """One after the other, threads that come and go."""
    ops, layer = NativeOps(kernels, 3), Layer()
    try:
        for _ in range(10):
            with ThreadPoolExecutor(1) as thread:
                assert thread.submit(layer.is_right, ops).result()
    finally:
        ops.close()


def test_pools_side_by_side(kernels: Kernels) -> None:
    """Many may be open, of which several compute at a time; closing one leaves the others as they are."""
    pools, layer = [NativeOps(kernels, 2) for _ in range(12)], Layer()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            assert all(threads.map(layer.is_right, pools))
            pools.pop().close()
    for pool in pools:
        pool.close()


@pytest.mark.slow
def test_too_many_threads_are_an_error() -> None:
    """Where the system refuses one, those before it end, and whoever asked is told."""
    code = """
import os, resource
from ferrum_rt.kernels.cpu import load_kernels
from tests.kernels.test_native_pool import wait_for_threads
kernels = load_kernels()
threads = len(os.listdir("/proc/self/task"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
try:
    kernels.open_pool(1000)
except RuntimeError:
    print(wait_for_threads(threads) - threads)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def run_steps(kernels: Kernels, num_threads: int, seconds: float = 0.5) -> float:
    """Steps of 20 multiplications that are done in a second, on as many threads."""
    ops = NativeOps(kernels, num_threads)
    x, out = torch.ones(1, 1024).bfloat16(), ops.empty((1, 2048), torch.bfloat16)
    packed = ops.pack_linear(torch.ones(2048, 1024).bfloat16(), None)

    with ops.record(Rows.TOKENS, 1) as instructions:
        for _ in range(20):
            ops.linear(out, x, packed)

    program = Program(instructions)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        ops.run(program, BatchSizes(1, 1, 1))
        count += 1
    ops.close()
    return count / (time.perf_counter() - began)


@pytest.mark.proof
@needs_two_cpus
def test_a_busy_neighbour_takes_no_more_than_its_share(kernels: Kernels) -> None:
    """Beside a process that keeps one core busy a third of the steps come at least that come without it, and a quarter with
    twice as many threads as CPUs: half of that core's time is the neighbour's, and every instruction may wait for it."""
    num_cpus = len(os.sched_getaffinity(0))
    neighbour = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert neighbour.stdout is not None
        neighbour.stdout.read(1)
        ratios: dict[int, list[float]] = {num_cpus: [], 2 * num_cpus: []}
        for _ in range(5):
            neighbour.send_signal(signal.SIGSTOP)
            alone = run_steps(kernels, num_cpus)
            neighbour.send_signal(signal.SIGCONT)
            for num_threads, found in ratios.items():
                found.append(run_steps(kernels, num_threads) / alone)
    finally:
        neighbour.kill()
        neighbour.communicate()
    assert statistics.median(ratios[num_cpus]) > 1 / 3, ratios
    assert statistics.median(ratios[2 * num_cpus]) > 1 / 4, ratios
