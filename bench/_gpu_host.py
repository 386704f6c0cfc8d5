"""What the host spends on a step of 32 decodes, in its event loop and in the executor's thread; whether the GPU waits."""

import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch

from bench._common import progress, spread
from bench._gpu_engines import Settings, equal_requests, open_ours
from bench._gpu_models import read_config, write_model
from bench.host_overhead import Window
from tests.runtime.cuda_engines import emulated_engine


class LaunchTimes:
    """Processor seconds of the executor's thread in ``execute``, and the seconds that went by in it."""

    def __init__(self, executor: Any) -> None:
        self.num_steps, self.processor_s, self.wall_s = 0, 0.0, 0.0
        self._execute = executor.execute
        executor.execute = self._timed

    def _timed(self, step: Any) -> Any:
        processor, wall = time.thread_time(), time.perf_counter()
        try:
            return self._execute(step)
        finally:
            self.num_steps += 1
            self.processor_s += time.thread_time() - processor
            self.wall_s += time.perf_counter() - wall


@asynccontextmanager
async def _engines(is_smoke: bool, name: str, batch: int) -> AsyncIterator[tuple[Any, int]]:
    """An engine, and how many tokens it knows."""
    if is_smoke:
        async with emulated_engine(scheduler={"max_running_requests": batch}) as engine:
            yield engine, 4096
        return
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(name, Path(directory))
        async with open_ours(model, Settings(1024, batch, 8192, 0.85, "cuda")) as engine:
            yield engine, read_config(model)["vocab_size"]


async def host_times(is_smoke: bool, put: Callable[..., None]) -> None:
    """``put`` the figures of each model; those of the emulated device say nothing."""
    batch, count, repeats = (4, 12, 2) if is_smoke else (32, 256, 6)
    for name in ("emulated",) if is_smoke else ("Qwen3-0.6B", "Llama-3.1-8B"):
        rows: list[dict[str, float]] = []
        async with _engines(is_smoke, name, batch) as (engine, vocab_size):
            executor = engine._model.executor
            launches = LaunchTimes(executor)
            for repeat in range(repeats):
                rows.append(await _one(engine, launches, batch, count, vocab_size, repeat))
                rows[-1]["gpu"] = graph_us(executor, batch, 2 if is_smoke else 100)
        rows = rows[1:]  # the first one warms up
        found = {f"{part}_us": spread(row[part] for row in rows) for part in rows[0]}
        put(**{name: {"batch": batch, **found, "gpu_waits": spread(1 - row["gpu"] / row["wall"] for row in rows)}})
        progress(f"{name}: a step of {found['wall_us'].show(0)} µs, the graph alone {found['gpu_us'].show(0)}")


async def _one(engine: Any, launches: LaunchTimes, batch: int, count: int, vocab_size: int, seed: int) -> dict[str, float]:
    window = Window(engine, batch)
    workload = equal_requests(batch, 32, count, vocab_size, seed)
    before = launches.num_steps, launches.processor_s, launches.wall_s

    async def read(prompt: list[int]) -> None:
        has_started = False
        async with engine.infer_stream(prompt, max_tokens=count, temperature=0.0, ignore_eos=True) as chunks:
            async for _ in chunks:
                if not has_started:
                    has_started = True
                    window.reader_started()
        window.reader_finished()

    async with anyio.create_task_group() as tasks:
        for prompt in workload.prompts:
            tasks.start_soon(read, prompt)
    per_step = window.per_step()
    # With the few steps of the prompts, which are eager.
    num_steps, processor_s, wall_s = (
        now - then for now, then in zip((launches.num_steps, launches.processor_s, launches.wall_s), before, strict=True)
    )
    return {
        "wall": per_step.wall,
        "loop_thread": per_step.loop,
        "scheduler": per_step.scheduler,
        "executor_thread": 1e6 * processor_s / num_steps,
        "executor_wall": 1e6 * wall_s / num_steps,
    }


def graph_us(executor: Any, batch: int, replays: int) -> float:
    """Microseconds of the graph alone, with nothing done between replays: the least that a step can take. Nobody may be
    using the engine; what the replays write lies in pages of requests that have ended."""
    graph = next(made for size, made in executor._graphs.items() if size >= batch)
    device = executor._device
    with torch.inference_mode(), device.stream():
        replay_all = partial(_replay, graph.graph, replays)
        replay_all()
        device.synchronize()
        began = time.perf_counter()
        replay_all()
        device.synchronize()
    return 1e6 * (time.perf_counter() - began) / replays


def _replay(graph: Any, count: int) -> None:
    for _ in range(count):
        graph.replay()
