"""How much does choosing the tokens add to a decode step?

The executor decodes a batch with random weights in the shape of Qwen3-0.6B, whose vocabulary has 151,936 tokens. For each
set of SamplingParams below, all rows ask for it. Measured in each step is the time of choosing beside that of the forward
pass with its logits; the share is their ratio. What the native step chooses itself, the likeliest token of each row and
draws by temperature, top_k, top_p and min_p, is timed by having the same kernels choose once more from the same logits, and
is taken off the step's time; what it leaves to the sampler is timed there (beginning before the model runs, drawing after
it).
The sets take turns within each repeat. Histories are 128 tokens long, because a longer one would only make attention slower,
and so the share smaller; their keys and values are zeros, because only the time matters.

Random weights give a flat distribution, which is the worst case for top_p alone: no few candidates reach it.

    python -m bench.sampling [--batch 32] [--repeats 7] [--steps 4] [--threads 2]
"""

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench._common import TINY, Spread, finish, limit_threads, machine, progress, qwen3_config, spread, table

CONTEXT = 128
BLOCK_SIZE = 16
LIMITS = {"none": 0.02, "usual": 0.15, "everything": 0.40}
"""The shares that issue 3 allows."""


def parameters(vocab_size: int) -> dict[str, dict[str, Any]]:
    """Fields of SamplingConfig, by the name of the set."""
    generator = random.Random(5)
    some = generator.sample(range(vocab_size), min(vocab_size // 2, 1000))
    usual = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    everything = {
        **usual,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": dict.fromkeys(some[:100], 1.0),
        "allowed_token_ids": list(range(vocab_size - 10)),
        "bad_words": [some[at : at + 3] for at in range(100, 164)],
        "min_tokens": 10_000,
        "end_token_ids": frozenset(some[-2:]),
        "logprobs": 5,
    }
    return {
        "none": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "usual": usual,
        "top_p alone": {"temperature": 0.8, "top_p": 0.95},
        "min_p alone": {"temperature": 0.8, "min_p": 0.1},
        "logprobs": {"temperature": 0.0, "logprobs": 20},
        "everything": everything,
    }


class Bench:
    """An executor whose slots all hold ``CONTEXT`` tokens."""

    def __init__(self, config: dict[str, Any], batch: int, steps: int) -> None:
        import torch

        from ferrum_rt.interfaces.config import build_config
        from ferrum_rt.runtime.execution.executor import DecoderExecutor
        from ferrum_rt.runtime.execution.step_runner import RecordedRunner
        from ferrum_rt.runtime.loading.loader import load_model

        with tempfile.TemporaryDirectory(prefix="ferrum-bench-") as directory:
            Path(directory, "config.json").write_text(json.dumps(config), encoding="utf-8")
            engine_config = build_config(
                directory,
                None,
                {
                    "load_format": "dummy",
                    "max_model_len": CONTEXT + BLOCK_SIZE * (1 + steps // BLOCK_SIZE),
                    "scheduler": {"max_running_requests": batch},
                    "kv_cache": {"block_size": BLOCK_SIZE},
                },
            )
            executor = load_model(engine_config).executor
        assert isinstance(executor, DecoderExecutor)
        with torch.inference_mode():
            for pages in executor._cache:
                pages.data.zero_()
        self._executor, self._batch, self._steps = executor, batch, steps
        self._step_s = self._native_s = self._sampler_s = 0.0
        runner, sampler = executor._runner, executor._sampler
        assert isinstance(runner, RecordedRunner), "the native kernels are measured: install a compiler"
        self._runner = runner
        runner.run = self._timed(runner.run, "_step_s")  # type: ignore[method-assign]
        sampler.prepare = self._timed(sampler.prepare, "_sampler_s")  # type: ignore[method-assign]
        sampler.sample = self._timed(sampler.sample, "_sampler_s")  # type: ignore[method-assign]

    def run(self, fields: dict[str, Any]) -> tuple[float, float]:
        """Seconds per step in the forward pass, and choosing."""
        from ferrum_rt.interfaces.model_executor import DecodeInput, SlotAssignment, StepInput, UnifiedBatch
        from ferrum_rt.interfaces.sampler import SamplingConfig, SequenceHistory
        from ferrum_rt.interfaces.types import RequestId, TokenId

        generator = random.Random(9)
        vocab_size = self._executor.model_info.vocab_size
        num_pages = self._executor.model_info.max_model_len // BLOCK_SIZE
        assigned = []
        for slot in range(self._batch):
            known = [TokenId(generator.randrange(vocab_size)) for _ in range(CONTEXT)]
            pages = list(range(slot * num_pages, (slot + 1) * num_pages))
            sampling = SamplingConfig(**fields, seed=slot)
            history = SequenceHistory(token_ids=known, num_prompt_tokens=CONTEXT // 2)
            assigned.append(SlotAssignment(slot, RequestId(str(slot)), sampling, pages, history))
        for step in range(self._steps + 1):
            if step == 1:  # the first one takes the slots over, and warms up
                self._step_s = self._native_s = self._sampler_s = 0.0
            decodes = [DecodeInput(slot, CONTEXT + step) for slot in range(self._batch)]
            step_input = StepInput(assigned if step == 0 else [], [], [], UnifiedBatch(decodes, []))
            output = self._executor.execute(step_input).result()
            assert all(item.sampled.error is None for item in output.decodes)
            self._choose_again()
        return (self._step_s - self._native_s) / self._steps, (self._native_s + self._sampler_s) / self._steps

    def _choose_again(self) -> None:
        """What the step has just chosen natively."""
        ops, recorded, batch = self._runner._ops, self._runner._recorded, self._executor._inputs.batch()
        began = time.perf_counter()
        ops.argmax(recorded.highest, recorded.ids, recorded.logits)
        ops.draw(recorded.ids, recorded.highest, recorded.logits, batch.positions, batch.logit_rows, recorded.draws)
        self._native_s += time.perf_counter() - began

    def _timed(self, function: Callable[..., Any], total: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            setattr(self, total, getattr(self, total) + time.perf_counter() - began)
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description="How much does choosing the tokens add to a decode step?")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="decode steps of each set in each repeat")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.repeats, args.steps = 4, 1, 2

    facts = machine()
    limit_threads(args.threads)
    config = qwen3_config(**TINY) if args.smoke else qwen3_config()
    sets = parameters(config["vocab_size"])
    bench = Bench(config, args.batch, args.steps)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sets}
    for repeat, name in itertools.product(range(args.repeats), sets):
        taken[name].append(bench.run(sets[name]))
        forward, choosing = taken[name][-1]
        progress(f"repeat {repeat + 1} of {args.repeats}, {name}: {choosing * 1e3:.2f} ms beside {forward * 1e3:.1f} ms")

    shares: dict[str, Spread] = {
        name: spread(choosing / forward for forward, choosing in times) for name, times in taken.items()
    }
    rows = []
    for name, times in taken.items():
        forward_ms, choosing_ms = (spread(1e3 * time[part] for time in times) for part in (0, 1))
        limit = f"{LIMITS[name]:.0%}" if name in LIMITS else ""
        rows.append([name, choosing_ms.show(2), forward_ms.show(), f"{shares[name].median:.2%}", limit])
    print(f"Batch {args.batch}, vocabulary {config['vocab_size']}: median (low to high) of {args.repeats} repeats")
    print(table(["sampling", "choosing ms", "forward ms", "share", "limit"], rows))
    finish(
        "sampling",
        facts,
        {"batch": args.batch, "vocab_size": config["vocab_size"], "context": CONTEXT, "steps": args.steps},
        {
            "share_of_forward": shares,
            "choosing_ms": {name: spread(1e3 * choosing for _, choosing in times) for name, times in taken.items()},
            "forward_ms": {name: spread(1e3 * forward for forward, _ in times) for name, times in taken.items()},
        },
    )


if __name__ == "__main__":
    main()
