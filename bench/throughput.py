"""How fast is the runtime beside transformers on the same checkpoint?

Greedy generation from token ids by three engines: ours (open_runtime and infer_batch), transformers' ``model.generate``,
and transformers' continuous batching (through the manager that ``model.generate_batch`` starts and stops around each call;
here it is started once, so that this is not counted). The checkpoint is made for the occasion: random weights in the shape
of Qwen3-0.6B, in bfloat16. Each engine runs in a process of its own, one at a time, with the same number of threads, and
the repeats are interleaved. Counted is the time from handing over the prompts until every request has its last token,
prefill included. No request ends early, and no prompt is used twice.

    python -m bench.throughput [--batch 1 16] [--repeats 5] [--layers 28] [--tiny] [--threads N] [--model DIRECTORY]
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio

import ferrum_rt
from bench._common import TINY, finish, limit_threads, machine, progress, qwen3_config, spread, table

OURS, GENERATE, CONTINUOUS = "ferrum_rt", "generate", "continuous batching"
PEERS = (GENERATE, CONTINUOUS)
SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "dtype")

T = TypeVar("T")
TokenIds = list[int]
Generate = Callable[[list[TokenIds], int], Awaitable[list[TokenIds]]]
"""From prompts and a number of tokens to what was generated after each prompt."""


class Job(NamedTuple):
    """What one process does with the checkpoint in ``model``: for each batch size, so many prompts at once."""

    model: Path
    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.output_tokens

    @property
    def max_batched_tokens(self) -> int:
        """Room for all the prompts in one step."""
        return max(512, max(self.batches) * self.prompt_tokens)

    def prompts(self, batch: int, purpose: str) -> list[TokenIds]:
        rng = random.Random(f"{self.seed} {batch} {purpose}")
        return [[rng.randrange(self.vocab_size) for _ in range(self.prompt_tokens)] for _ in range(batch)]


class Measured(NamedTuple):
    seconds: float
    outputs: list[TokenIds]


# -- the engines --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ours(job: Job) -> AsyncIterator[Generate]:
    async with ferrum_rt.open_runtime(
        job.model,
        scheduler={"max_running_requests": max(job.batches)},
        batching={"max_batched_tokens": job.max_batched_tokens},
        max_model_len=job.length,
    ) as engine:

        async def generate(prompts: list[TokenIds], count: int) -> list[TokenIds]:
            results = await engine.infer_batch(prompts, max_tokens=count, temperature=0.0, ignore_eos=True)
            for result in results:
                if isinstance(result, ferrum_rt.FerrumError):
                    raise result
            return [list(result.token_ids) for result in results if isinstance(result, ferrum_rt.InferenceResponse)]

        yield generate


@asynccontextmanager
async def transformers_generate(job: Job) -> AsyncIterator[Generate]:
    import torch

    model = load_in_transformers(job.model)

    async def generate(prompts: list[TokenIds], count: int) -> list[TokenIds]:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [row[ids.shape[1] :] for row in output.tolist()]

    yield generate


@asynccontextmanager
async def transformers_continuous_batching(job: Job) -> AsyncIterator[Generate]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_in_transformers(job.model)
    page_size = 256  # its default
    config = ContinuousBatchingConfig(
        page_size=page_size,
        # Twice what is needed, as it keeps some free. Left to itself it takes 60 % of the machine's memory.
        num_blocks=8 + 2 * max(job.batches) * -(-job.length // page_size),
        max_batch_tokens=job.max_batched_tokens,
        auto_switch_to_flash=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, timeout=60
    ) as manager:

        async def generate(prompts: list[TokenIds], count: int) -> list[TokenIds]:
            ids = manager.add_requests(inputs=prompts, max_new_tokens=count)
            outputs: dict[str, TokenIds] = {}
            while len(outputs) < len(prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    outputs[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("the thread of transformers' continuous batching has ended")
            return [outputs[request_id] for request_id in ids]

        yield generate


def load_in_transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # no request is to end early
    return model


ENGINES: dict[str, Callable[[Job], AbstractAsyncContextManager[Generate]]] = {
    OURS: ours,
    GENERATE: transformers_generate,
    CONTINUOUS: transformers_continuous_batching,
}


# -- in a process of its own ----------------------------------------------------------------------------------------------


def measure(engine: str, job: Job) -> dict[int, Measured]:
    """By batch size."""

    async def run() -> dict[int, Measured]:
        measured = {}
        async with ENGINES[engine](job) as generate:
            for batch in job.batches:
                await generate(job.prompts(batch, "warm-up"), min(8, job.output_tokens))
                prompts = job.prompts(batch, "measured")
                began = time.perf_counter()
                outputs = await generate(prompts, job.output_tokens)
                measured[batch] = Measured(time.perf_counter() - began, outputs)
                lengths = [len(output) for output in outputs]
                if lengths != [job.output_tokens] * batch:
                    raise RuntimeError(f"{engine}: asked for {batch} times {job.output_tokens} tokens, got {lengths}")
        return measured

    return anyio.run(run, backend_options={"use_uvloop": True})


def create_checkpoint(directory: Path, config: dict[str, Any]) -> None:
    """Random weights by transformers, and a byte-level tokenizer as large as the vocabulary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    settings = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta")}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**settings), dtype=torch.bfloat16)
    model.save_pretrained(directory)

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"word{number}" for number in range(len(words), config["vocab_size"])]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def new_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def in_process(function: Callable[[], T], shared: ProcessPoolExecutor | None) -> T:
    """Call it in a process of its own, or in the ``shared`` one."""
    if shared is not None:
        return shared.submit(function).result()
    with new_process() as own:
        return own.submit(function).result()


# -- all of it together ---------------------------------------------------------------------------------------------------


def run_repeat(job: Job, number: int, shared: ProcessPoolExecutor | None) -> dict[str, dict[int, Measured]]:
    """Every engine once, by name."""
    measured = {}
    for engine in ENGINES:
        measured[engine] = in_process(partial(measure, engine, job), shared)
        rates = (f"{rate(job, measured[engine], batch):.1f} tokens/s at batch {batch}" for batch in job.batches)
        progress(f"repeat {number}, {engine}: {', '.join(rates)}")
    return measured


def rate(job: Job, measured: dict[int, Measured], batch: int) -> float:
    """Generated tokens per second."""
    return batch * job.output_tokens / measured[batch].seconds


def agreement(outputs: Sequence[TokenIds], reference: Sequence[TokenIds]) -> float:
    """The share of generated tokens before the first that differs. Rounding alone makes random weights part early, since
    their logits lie close together: compare ours with what transformers' two ways have in common."""
    pairs = [zip(mine, other, strict=True) for mine, other in zip(outputs, reference, strict=True)]
    equal = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs]
    return sum(equal) / sum(len(output) for output in outputs)


def summarize(job: Job, repeats: Sequence[dict[str, dict[int, Measured]]]) -> list[dict[str, Any]]:
    """A row per batch size. Ratios are taken within each repeat."""
    rows = []
    for batch in job.batches:
        rates = {engine: [rate(job, repeat[engine], batch) for repeat in repeats] for engine in ENGINES}
        ratios = {peer: [mine / other for mine, other in zip(rates[OURS], rates[peer], strict=True)] for peer in PEERS}
        agreements = {
            engine: statistics.mean(
                agreement(repeat[engine][batch].outputs, repeat[GENERATE][batch].outputs) for repeat in repeats
            )
            for engine in (OURS, CONTINUOUS)
        }
        rows.append(
            {
                "batch": batch,
                "tokens_per_s": {engine: spread(values) for engine, values in rates.items()},
                "ours_over": {peer: spread(values) for peer, values in ratios.items()},
                "agreement_with_generate": agreements,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    header = ["batch", *ENGINES, *(f"ours / {peer}" for peer in PEERS)]
    return table(
        header,
        [
            [
                row["batch"],
                *(row["tokens_per_s"][engine].show() for engine in ENGINES),
                *(row["ours_over"][peer].show(2) for peer in PEERS),
            ]
            for row in rows
        ],
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is the runtime beside transformers on the same checkpoint?")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=28, help="of the checkpoint that is made")
    parser.add_argument("--tiny", action="store_true", help="make a checkpoint of a few thousand parameters")
    parser.add_argument("--model", type=Path, help="a checkpoint to use instead of making one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="that each engine computes with")
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.tiny, args.batch, args.repeats, args.output_tokens = True, [1, 2], 1, 8
    return args


def main() -> None:
    args = parse_arguments()
    limit_threads(args.threads)
    facts = machine()
    with ExitStack() as stack:
        # A smoke run imports transformers only once.
        shared = stack.enter_context(new_process()) if args.smoke else None
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ferrum-bench-"))
        model = args.model or Path(directory)
        if args.model is None:
            config = qwen3_config(**{"num_hidden_layers": args.layers, **(TINY if args.tiny else {})})
            in_process(partial(create_checkpoint, model, config), shared)
            progress("made the checkpoint")
        config = json.loads((model / "config.json").read_bytes())
        job = Job(model, tuple(args.batch), args.prompt_tokens, args.output_tokens, config["vocab_size"], seed=0)
        repeats = [run_repeat(job._replace(seed=number), number, shared) for number in range(1, args.repeats + 1)]

    rows = summarize(job, repeats)
    print(f"Tokens generated per second: median (low to high) of {args.repeats} repeats")
    print(show(rows))
    finish(
        "throughput",
        facts,
        {
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "repeats": args.repeats,
            "threads": args.threads,
            "model": str(args.model or "random weights"),
            "shape": {key: config.get(key) for key in SHAPE},
        },
        {"results": rows},
    )


if __name__ == "__main__":
    main()
