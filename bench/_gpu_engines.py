"""The engines that take turns on a GPU, each in a process of its own that stays there with its model loaded.

    python -m bench._gpu_engines ENGINE MODEL SETTINGS      (ferrum_rt, vllm or transformers; SETTINGS are JSON)

reads a Workload as a line of JSON from standard input, and writes what it took to the descriptor that standard output was:
whatever libraries print goes to standard error.
"""

import itertools
import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

OURS, VLLM, TRANSFORMERS = "ferrum_rt", "vllm", "transformers"


class Workload(NamedTuple):
    """Requests that come all at once, as token ids with the number of tokens to generate."""

    prompts: list[list[int]]
    num_outputs: list[int]
    temperature: float = 0.0

    @property
    def num_generated(self) -> int:
        return sum(self.num_outputs)


class Settings(NamedTuple):
    """How an engine is opened. ``utilization`` is the part of the GPU's memory that it may take."""

    max_model_len: int
    max_requests: int
    max_batched_tokens: int
    utilization: float
    device: str


def equal_requests(count: int, prompt: int, output: int, vocab_size: int, seed: int) -> Workload:
    """Prompts that nobody has seen before."""
    rng = random.Random(f"{seed} {count}")
    return Workload([[rng.randrange(vocab_size) for _ in range(prompt)] for _ in range(count)], [output] * count)


def mixed_requests(count: int, longest: int, vocab_size: int, shortest: int = 100) -> Workload:
    """Nano-vllm's benchmark: prompts and outputs of ``shortest`` to ``longest`` tokens, seed 0, temperature 0.6."""
    rng = random.Random(0)
    most = min(10_000, vocab_size - 1)
    prompts = [[rng.randint(0, most) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]
    return Workload(prompts, [rng.randint(shortest, longest) for _ in range(count)], 0.6)


# -- ours -----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_ours(model: Path, settings: Settings, **fields: Any) -> AsyncIterator[Any]:
    """``fields`` are laid over what the settings come to."""
    import ferrum_rt

    async with ferrum_rt.open_runtime(
        model,
        load_format="dummy",
        device=settings.device,
        max_model_len=settings.max_model_len,
        **{
            # Nothing is held back for the sake of others' gaps: what is compared is throughput.
            "scheduler": {"max_running_requests": settings.max_requests, "itl_target_s": 10.0},
            "batching": {"max_batched_tokens": settings.max_batched_tokens},
            "memory": {"utilization": settings.utilization},
            "kv_cache": {"prefix_caching": False},
            **fields,
        },
    ) as engine:
        yield engine


async def read_stream(engine: Any, prompt: list[int], count: int, temperature: float) -> list[float]:
    """When each token came, by ``perf_counter``. Raises RuntimeError where there are not ``count``."""
    times: list[float] = []
    async with engine.infer_stream(prompt, max_tokens=count, temperature=temperature, top_p=1.0, ignore_eos=True) as chunks:
        async for chunk in chunks:
            times.extend([time.perf_counter()] * len(chunk.token_ids))
    if len(times) != count:
        raise RuntimeError(f"asked for {count} tokens, got {len(times)}")
    return times


async def run_ours(engine: Any, workload: Workload) -> dict[str, Any]:
    """Seconds from handing over the requests to the last token, to each one's first, and between two of its tokens."""
    import anyio

    began = time.perf_counter()
    times: list[list[float]] = []

    async def read(prompt: list[int], count: int) -> None:
        times.append(await read_stream(engine, prompt, count, workload.temperature))

    async with anyio.create_task_group() as tasks:
        for prompt, count in zip(workload.prompts, workload.num_outputs, strict=True):
            tasks.start_soon(read, prompt, count)
    return {
        "seconds": time.perf_counter() - began,
        "first": [each[0] - began for each in times],
        "gaps": [after - before for each in times for before, after in itertools.pairwise(each)],
    }


def serve_ours(model: Path, settings: Settings, receive: Callable[[], Workload | None], send: Callable[[Any], None]) -> None:
    import anyio

    async def main() -> None:
        async with open_ours(model, settings) as engine:
            send({"is_ready": True})
            while (workload := await anyio.to_thread.run_sync(receive)) is not None:
                send(await run_ours(engine, workload))

    anyio.run(main, backend_options={"use_uvloop": True})


# -- peers ----------------------------------------------------------------------------------------------------------------


def serve_vllm(model: Path, settings: Settings, receive: Callable[[], Workload | None], send: Callable[[Any], None]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_requests,
        max_num_batched_tokens=settings.max_batched_tokens,
        gpu_memory_utilization=settings.utilization,
        enable_prefix_caching=False,
        seed=0,
    )
    send({"is_ready": True})
    while (workload := receive()) is not None:
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        sampling = [
            SamplingParams(max_tokens=count, temperature=workload.temperature, ignore_eos=True, detokenize=False)
            for count in workload.num_outputs
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        _check([len(output.outputs[0].token_ids) for output in outputs], workload)
        send({"seconds": seconds})


def serve_transformers(
    model: Path, settings: Settings, receive: Callable[[], Workload | None], send: Callable[[Any], None]
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    device = torch.device(settings.device)
    with device:
        made = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    made.to(device).eval().generation_config.eos_token_id = None
    stay = {"auto_switch_to_flash": False} if hasattr(ContinuousBatchingConfig, "auto_switch_to_flash") else {}
    page_size = 256  # its own choice, by a name that changed after 5.17
    config = ContinuousBatchingConfig(
        num_blocks=8 + 2 * min(settings.max_requests, 64) * -(-settings.max_model_len // page_size),
        max_batch_tokens=settings.max_batched_tokens,
        **cast(Any, stay),
    )
    send({"is_ready": True})
    while (workload := receive()) is not None:
        samples = workload.temperature > 0
        generation = GenerationConfig(
            do_sample=samples,
            temperature=workload.temperature if samples else None,
            eos_token_id=-1,
            pad_token_id=0,
            max_new_tokens=max(workload.num_outputs),
        )
        with made.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, timeout=60
        ) as manager:
            began = time.perf_counter()
            for prompt, count in zip(workload.prompts, workload.num_outputs, strict=True):
                manager.add_request(prompt, max_new_tokens=count)
            lengths: list[int] = []
            while len(lengths) < len(workload.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    lengths.append(len(result.generated_tokens))
                elif result is None and not manager.is_running():
                    raise RuntimeError("the thread of transformers' continuous batching has ended")
            seconds = time.perf_counter() - began
        _check(sorted(lengths), workload._replace(num_outputs=sorted(workload.num_outputs)))
        send({"seconds": seconds})


def _check(lengths: list[int], workload: Workload) -> None:
    if lengths != workload.num_outputs:
        raise RuntimeError("not all requests have as many tokens as were asked for")


# -- taking turns ---------------------------------------------------------------------------------------------------------


class EngineProcess:
    """An engine elsewhere. ``site`` is put where its packages are to be looked for first, instead of ours."""

    def __init__(self, engine: str, model: Path, settings: Settings, site: Path | None = None) -> None:
        self.name = engine
        environment = dict(os.environ)
        if site is not None:
            environment |= {
                "PYTHONPATH": f"{site}:{Path(__file__).parent.parent}",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "HF_HUB_OFFLINE": "1",
            }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench._gpu_engines", engine, str(model), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def wait_ready(self, limit_s: float) -> None:
        self._receive(limit_s)

    def run(self, workload: Workload, limit_s: float = 120.0) -> dict[str, Any]:
        """Raises RuntimeError if the process has ended or takes longer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(workload) + "\n")
        self._process.stdin.flush()
        return self._receive(limit_s)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"{self.name}: {'its process has ended' if ready else f'no answer in {limit_s:.0f} s'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


_SERVERS = {OURS: serve_ours, VLLM: serve_vllm, TRANSFORMERS: serve_transformers}


def main() -> None:
    engine, model, settings = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def receive() -> Workload | None:
        line = sys.stdin.readline()
        return Workload(*json.loads(line)) if line else None

    def send(answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    _SERVERS[engine](Path(model), Settings(*json.loads(settings)), receive, send)


if __name__ == "__main__":
    main()
