"""The parts of bench.gpu, each run in a process of its own: ``python -m bench._gpu_parts PART RESULT_FILE OPTIONS``.

A part hands over what it has found as soon as it has it, so that one that is cut off in the middle leaves what it had.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from bench._common import machine, plain, progress, quantile, spread
from bench._gpu_engines import (
    OURS,
    TRANSFORMERS,
    VLLM,
    EngineProcess,
    Settings,
    Workload,
    equal_requests,
    mixed_requests,
    open_ours,
    read_stream,
    run_ours,
)
from bench._gpu_models import decode_bytes, read_config, write_model

ROOT = Path(__file__).parent.parent
_OUTCOME = re.compile(r"^(tests/gpu/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
CONCURRENCIES = (1, 4, 16, 32, 64)


class Options(NamedTuple):
    """``out`` is the folder of all results; ``bandwidth`` the GPU's as it was measured, in bytes per second."""

    out: str
    is_smoke: bool
    vllm: str | None
    limit_s: float
    bandwidth: float | None

    @property
    def device(self) -> str:
        return "cpu" if self.is_smoke else "cuda"

    def settings(self, max_model_len: int, max_requests: int, *, tokens: int = 8192, utilization: float = 0.85) -> Settings:
        tokens = 512 if self.is_smoke else tokens
        return Settings(max_model_len, max_requests, tokens, utilization, self.device)


class Report:
    """What is known so far, in a file that is whole at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def put(self, **found: Any) -> None:
        self._found |= found
        half = self._path.with_suffix(".half")
        half.write_text(json.dumps(plain(self._found)), encoding="utf-8")
        half.replace(self._path)


def models(options: Options, names: tuple[str, ...], directory: str) -> dict[str, Path]:
    names = names[:1] if options.is_smoke else names
    return {name: write_model(name, Path(directory), is_tiny=options.is_smoke) for name in names}


# -- a to c ---------------------------------------------------------------------------------------------------------------


def environment(options: Options, report: Report) -> None:
    """Versions, the device, and how fast it copies."""
    import torch

    facts = machine()
    report.put(machine=facts, torch_cuda=torch.version.cuda, commit=_said("git", "rev-parse", "HEAD"))
    report.put(nvcc=_said("nvcc", "--version")[-80:], flashinfer=_version("flashinfer-python"))
    if options.is_smoke:
        x = torch.zeros(2**24, dtype=torch.uint8)
        report.put(device="none", copy_bytes_per_s=_copy_rate(x, lambda: None))
        return
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.used"
    report.put(
        device=properties.name,
        memory_bytes=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        capability=f"{properties.major}.{properties.minor}",
        nvidia_smi={query: _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")},
    )
    x = torch.zeros(2**32, dtype=torch.uint8, device="cuda")
    report.put(copy_bytes_per_s=_copy_rate(x, torch.cuda.synchronize))


def _copy_rate(x: Any, synchronize: Callable[[], None]) -> Any:
    """Bytes read and written per second, of copies within the device."""
    y = x.clone()
    rates = []
    for _ in range(12):
        synchronize()
        began = time.perf_counter()
        y.copy_(x)
        synchronize()
        rates.append(2 * x.numel() / (time.perf_counter() - began))
    return spread(rates[2:])


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return repr(error)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def kernels(options: Options, report: Report) -> None:
    """Compile them, or on the emulation only see that each can be called."""
    from bench import _gpu_kernels

    if options.is_smoke:
        from tests.fakes import flashinfer

        for call in (todo := list(_gpu_kernels.calls("cpu", flashinfer))):
            call.make()
        report.put(called=[call.what for call in todo])
        return
    _gpu_kernels.compile_all("cuda", Path(options.out), report.put)


def tests(options: Options, report: Report) -> None:
    """tests/gpu; its whole output is in OUT/tests.log."""
    log = Path(options.out) / "tests.log"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "-W", "default"]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.5)
                report.put(**read_test_log(log))
        finally:
            process.kill()
    report.put(**read_test_log(log), exit_status=process.wait())


def read_test_log(log: Path) -> dict[str, Any]:
    """How many tests ended how, the names of those that did not pass, and the end of what pytest said."""
    text = log.read_text(encoding="utf-8", errors="replace")
    outcomes = {name: outcome.lower() for name, outcome in _OUTCOME.findall(text)}
    unlike = {name: outcome for name, outcome in outcomes.items() if outcome not in ("passed", "skipped")}
    return {"counts": Counter(outcomes.values()), "not_passed": unlike, "end": text[-6000:] if unlike else text[-300:]}


# -- d to i ---------------------------------------------------------------------------------------------------------------


async def decode(options: Options, report: Report) -> None:
    """One sequence, 32 tokens in and 128 out: what a step takes, and how much of the bandwidth its weights are."""
    with tempfile.TemporaryDirectory() as directory:
        names = ("Llama-3.1-8B", "Llama-3.2-1B", "Qwen3-0.6B")
        for name, model in models(options, names, directory).items():
            config, count = read_config(model), 8 if options.is_smoke else 128
            began = time.perf_counter()
            async with open_ours(model, options.settings(1024, 4)) as engine:
                open_s = time.perf_counter() - began
                steps = []
                for repeat in range(2 if options.is_smoke else 8):
                    (prompt,) = equal_requests(1, 32, count, config["vocab_size"], repeat).prompts
                    times = await read_stream(engine, prompt, count, 0.0)
                    steps.append((times[-1] - times[0]) / (count - 1))
            steps = steps[1:]  # the first one warms up
            found: dict[str, Any] = {"open_s": open_s, "ms_per_step": spread(1e3 * step for step in steps)}
            if options.bandwidth:
                found["share_of_copy_bandwidth"] = spread(decode_bytes(config) / step / options.bandwidth for step in steps)
            report.put(**{name: found})
            progress(f"{name}: {found['ms_per_step'].show(3)} ms a step")


async def concurrency(options: Options, report: Report) -> None:
    """Requests that come at once, 256 tokens in and 128 out."""
    with tempfile.TemporaryDirectory() as directory:
        for name, model in models(options, ("Llama-3.1-8B", "Qwen3-0.6B"), directory).items():
            vocab_size, rows = read_config(model)["vocab_size"], {}
            async with open_ours(model, options.settings(512, max(CONCURRENCIES))) as engine:
                for count in CONCURRENCIES[:2] if options.is_smoke else CONCURRENCIES:
                    found = []
                    for repeat in range(2 if options.is_smoke else 4):
                        workload = equal_requests(count, *_lengths(options), vocab_size, repeat)
                        found.append((workload, await run_ours(engine, workload)))
                    rows[count] = _rates(found[1:])
                    report.put(**{name: rows})
                    progress(f"{name}, {count} at once: {rows[count]['tokens_per_s'].show(0)} tokens/s")


def _lengths(options: Options) -> tuple[int, int]:
    return (16, 8) if options.is_smoke else (256, 128)


def _rates(found: list[tuple[Workload, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "tokens_per_s": spread(workload.num_generated / each["seconds"] for workload, each in found),
        "first_token_ms": _percentiles([1e3 * x for _, each in found for x in each["first"]]),
        "between_tokens_ms": _percentiles([1e3 * x for _, each in found for x in each["gaps"]]),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": quantile(values, 0.5), "p99": quantile(values, 0.99), "max": max(values)}


def nano_workload(options: Options, vocab_size: int) -> Workload:
    return mixed_requests(4, 12, vocab_size, 4) if options.is_smoke else mixed_requests(256, 1024, vocab_size)


async def nano(options: Options, report: Report) -> None:
    """Nano-vllm's benchmark."""
    with tempfile.TemporaryDirectory() as directory:
        for name, model in models(options, ("Qwen3-0.6B", "Llama-3.1-8B"), directory).items():
            workload = nano_workload(options, read_config(model)["vocab_size"])
            async with open_ours(model, options.settings(2304, 256)) as engine:
                await run_ours(engine, equal_requests(4, 16, 4, 100, 0))
                found = await run_ours(engine, workload)
                preemptions = engine.metrics().scheduler.preemptions
            report.put(**{name: {**_rates([(workload, found)]), "seconds": found["seconds"], "preemptions": preemptions}})
            progress(f"{name}: {workload.num_generated / found['seconds']:.0f} tokens/s")


async def long_prefill(options: Options, report: Report) -> None:
    """A prompt of 32k tokens beside 16 sequences that decode: how long they wait for a token, and it for its first."""
    readers, length = (2, 200) if options.is_smoke else (16, 32_000)
    settings = options.settings(length + 64, readers + 1, tokens=2048)
    fields = {"scheduler": {"max_running_requests": readers + 1}, "monitoring": {"progress": False}}
    with tempfile.TemporaryDirectory() as directory:
        for name, model in models(options, ("Llama-3.1-8B",), directory).items():
            vocab_size = read_config(model)["vocab_size"]
            prompts = equal_requests(readers, 32, 1, vocab_size, 0).prompts
            (long,) = equal_requests(1, length, 1, vocab_size, 1).prompts
            async with open_ours(model, settings, **fields) as engine:
                await run_ours(engine, Workload(prompts, [4] * readers))
                found = await _beside(engine, prompts, long, 0.2 if options.is_smoke else 2.0)
            report.put(**{name: found})


async def _beside(engine: Any, prompts: list[list[int]], long: list[int], quiet_s: float) -> dict[str, Any]:
    times: list[list[float]] = [[] for _ in prompts]

    count = min(4096, engine.model_info.max_model_len - len(prompts[0]))

    async def decode(prompt: list[int], seen: list[float]) -> None:
        while True:
            async with engine.infer_stream(prompt, max_tokens=count, temperature=0.0, ignore_eos=True) as chunks:
                async for chunk in chunks:
                    seen.extend([time.perf_counter()] * len(chunk.token_ids))

    async with anyio.create_task_group() as tasks:
        for prompt, seen in zip(prompts, times, strict=True):
            tasks.start_soon(decode, prompt, seen)
        await anyio.sleep(quiet_s)
        began = time.perf_counter()
        (end,) = await read_stream(engine, long, 1, 0.0)
        tasks.cancel_scope.cancel()
    gaps = [(before, after) for seen in times for before, after in itertools.pairwise(seen)]
    return {
        "first_token_s": end - began,
        "between_tokens_ms": {
            "alone": _percentiles([1e3 * (after - before) for before, after in gaps if after < began]),
            "beside": _percentiles([1e3 * (after - before) for before, after in gaps if began < after < end]),
        },
    }


def busy_host(options: Options, report: Report) -> None:
    """bench.busy_host, with the default device."""
    command = [sys.executable, "-m", "bench.busy_host"]
    with tempfile.TemporaryDirectory() as directory:
        if options.is_smoke:
            command.append("--smoke")
        else:
            model = write_model("Qwen3-0.6B", Path(directory))
            command += ["--dummy", str(model), "--batch", "4", "16", "--seconds", "0.5"]
            command += ["--warm-up", "0.3", "--repeats", "2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=options.limit_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    report.put(**json.loads(done.stdout.splitlines()[-1]))


# -- j --------------------------------------------------------------------------------------------------------------------


def peer(options: Options, report: Report) -> None:
    """The same through vLLM, or through transformers where there is none: both engines are open at once, and take turns."""
    other = VLLM if options.vllm else TRANSFORMERS
    report.put(peer=other, order="in turns, each in a process of its own with 0.45 of the memory")
    with tempfile.TemporaryDirectory() as directory:
        for name, model in models(options, ("Qwen3-0.6B", "Llama-3.1-8B"), directory).items():
            settings = options.settings(2304, 256, utilization=0.45)
            engines: list[EngineProcess] = []
            try:
                # One after the other: each looks how much memory is free.
                for engine in (OURS, other):
                    site = Path(options.vllm) if options.vllm and engine == VLLM else None
                    engines.append(EngineProcess(engine, model, settings, site))
                    engines[-1].wait_ready(options.limit_s)
                report.put(**{name: _in_turns(options, name, engines, read_config(model)["vocab_size"], report)})
            finally:
                for process in engines:
                    process.close()


def _in_turns(
    options: Options, name: str, engines: list[EngineProcess], vocab_size: int, report: Report
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for label, make in _peer_workloads(options, vocab_size):
        rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for repeat in range(-1, 1 if options.is_smoke or label == "nano" else 3):
            workload = make(repeat + 1)
            for engine in engines:
                seconds = engine.run(workload if repeat >= 0 else make(0), options.limit_s)["seconds"]
                if repeat >= 0:
                    rates[engine.name].append(workload.num_generated / seconds)
        ours, theirs = (rates[engine.name] for engine in engines)
        found[label] = {
            "tokens_per_s": {engine: spread(values) for engine, values in rates.items()},
            "ours_over_peer": spread(mine / other for mine, other in zip(ours, theirs, strict=True)),
        }
        report.put(**{name: found})
        progress(f"{name}, {label}: {found[label]['ours_over_peer'].show(2)} times {engines[1].name}")
    return found


def _peer_workloads(options: Options, vocab_size: int) -> list[tuple[str, Callable[[int], Workload]]]:
    counts = CONCURRENCIES[:1] if options.is_smoke else CONCURRENCIES
    found: list[tuple[str, Callable[[int], Workload]]] = [
        (str(count), lambda seed, count=count: equal_requests(count, *_lengths(options), vocab_size, seed))  # type: ignore[misc]
        for count in counts
    ]
    # Its warm-up is short: what is measured takes most of a minute where the peer is slow.
    return [*found, ("nano", lambda seed: nano_workload(options, vocab_size) if seed else found[-1][1](99))]


async def host(options: Options, report: Report) -> None:
    from bench._gpu_host import host_times

    await host_times(options.is_smoke, report.put)


PARTS: dict[str, Callable[[Options, Report], Awaitable[None] | None]] = {
    "environment": environment,
    "kernels": kernels,
    "tests": tests,
    "decode": decode,
    "host": host,
    "concurrency": concurrency,
    "nano": nano,
    "long_prefill": long_prefill,
    "busy_host": busy_host,
    "peer": peer,
}


def run_part(name: str, result: Path, options: Options) -> None:
    report, part = Report(result), PARTS[name]
    report.put()

    async def main() -> None:
        done = part(options, report)
        if done is not None:
            await done

    anyio.run(main, backend_options={"use_uvloop": True})
    report.put(is_done=True)


def main() -> None:
    *names, folder, options = sys.argv[1:]
    for name in names:
        run_part(name, Path(folder) / f"{name}.json", Options(**json.loads(options)))
    sys.stdout.flush()
    os._exit(0)  # a library that hangs at the interpreter's end must not cost what was measured


if __name__ == "__main__":
    main()
