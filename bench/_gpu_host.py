"""What the host spends on a step of 32 decodes, in its event loop and in the executor's thread; whether the GPU waits. And
what steps with prompts take, captured in pieces and launched call by call."""

import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch

from bench._common import Spread, progress, spread
from bench._gpu_engines import Settings, equal_requests, open_ours
from bench._gpu_models import read_config, write_model
from bench.host_overhead import Window
from ferrum_rt.kernels.cuda.sampling import DrawForm
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
                rows[-1] |= graphs_us(executor, batch, 32 + count, 2 if is_smoke else 100)
            prompts = await _prompts_in_turns(engine, launches, batch, vocab_size, repeats)
        rows = rows[1:]  # the first one warms up
        found = {f"{part}_us": spread(row[part] for row in rows) for part in rows[0]}
        waits = spread(1 - row["gpu"] / row["wall"] for row in rows)
        put(**{name: {"batch": batch, **found, "gpu_waits": waits, "prompts": prompts}})
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


async def _prompts_in_turns(
    engine: Any, launches: LaunchTimes, batch: int, vocab_size: int, repeats: int
) -> dict[str, dict[str, Spread]]:
    """Short answers to prompts of 64 tokens, so that most steps have both in them: milliseconds for a request, and
    microseconds of a launch."""
    executor = engine._model.executor
    captured = executor._pieces
    rows: dict[str, list[dict[str, float]]] = {"pieces": [], "eager": []}
    for repeat in range(repeats):
        for kind, found in rows.items():
            executor._pieces = captured if kind == "pieces" else {}
            num_steps, wall_s = launches.num_steps, launches.wall_s
            workload = equal_requests(4 * batch, 64, 4, vocab_size, 1000 + repeat)
            began = time.perf_counter()
            async with anyio.create_task_group() as tasks:
                for prompt in workload.prompts:
                    tasks.start_soon(partial(engine.infer, prompt, max_tokens=4, temperature=0.0, ignore_eos=True))
            found.append(
                {
                    "request_ms": 1e3 * (time.perf_counter() - began) / len(workload.prompts),
                    "launch_us": 1e6 * (launches.wall_s - wall_s) / (launches.num_steps - num_steps),
                }
            )
    executor._pieces = captured
    return {kind: {part: spread(row[part] for row in found[1:]) for part in found[0]} for kind, found in rows.items()}


def graphs_us(executor: Any, batch: int, num_tokens: int, replays: int) -> dict[str, float]:
    """Microseconds of a greedy step's graphs alone (``gpu``), over ``num_tokens`` of each sequence and with nothing done
    between replays: the least that a step can take; and of the draws by themselves. Nobody may be using the engine; what the
    replays write lies in pages of requests that have ended."""
    size, graphs = next((size, made) for size, made in executor._graphs.items() if size >= batch)
    # The last step may have been one of another size, which shares its plan's memory.
    with torch.inference_mode(), executor._device.stream():
        executor._device.synchronize()
        graphs.attention.replan(list(range(size)), [num_tokens] * size, executor._block_tables)
    parts = {f"draw_{form.name.lower()}": [graphs.draws[form]] for form in DrawForm}
    parts["gpu"] = [graphs.forward, graphs.draws[DrawForm.GREEDY]]
    return {name: _replays_us(executor._device, part, replays) for name, part in parts.items()}


def _replays_us(device: Any, graphs: list[Any], replays: int) -> float:
    with torch.inference_mode(), device.stream():
        for _ in ("to warm up", "to time"):
            began = time.perf_counter()
            for graph in graphs * replays:
                graph.replay()
            device.synchronize()
    return 1e6 * (time.perf_counter() - began) / replays
