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
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench._common import TINY, finish, limit_threads, machine, progress, qwen3_config, spread, table
from bench._cpu_engines import (
    Generate,
    Job,
    Measured,
    Shape,
    agreement,
    create_checkpoint,
    in_process,
    measure,
    new_process,
    ours,
    transformers_continuous_batching,
    transformers_generate,
)

OURS, GENERATE, CONTINUOUS = "ferrum_rt", "generate", "continuous batching"
PEERS = (GENERATE, CONTINUOUS)
SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "dtype")

ENGINES: dict[str, Callable[[Job], AbstractAsyncContextManager[Generate]]] = {
    OURS: ours,
    GENERATE: transformers_generate,
    CONTINUOUS: transformers_continuous_batching,
}


def run_repeat(job: Job, number: int, shared: ProcessPoolExecutor | None) -> dict[str, dict[Shape, Measured]]:
    """Every engine once, by name."""
    measured = {}
    for engine in ENGINES:
        measured[engine] = in_process(partial(measure, ENGINES[engine], job), shared)
        rates = (f"{rate(shape, measured[engine]):.1f} tokens/s at batch {shape.requests}" for shape in job.shapes)
        progress(f"repeat {number}, {engine}: {', '.join(rates)}")
    return measured


def rate(shape: Shape, measured: dict[Shape, Measured]) -> float:
    """Generated tokens per second."""
    return shape.requests * shape.output_tokens / measured[shape].seconds


def summarize(job: Job, repeats: Sequence[dict[str, dict[Shape, Measured]]]) -> list[dict[str, Any]]:
    """A row per batch size. Ratios are taken within each repeat."""
    rows = []
    for shape in job.shapes:
        rates = {engine: [rate(shape, repeat[engine]) for repeat in repeats] for engine in ENGINES}
        ratios = {peer: [mine / other for mine, other in zip(rates[OURS], rates[peer], strict=True)] for peer in PEERS}
        agreements = {
            engine: statistics.mean(
                agreement(repeat[engine][shape].outputs, repeat[GENERATE][shape].outputs) for repeat in repeats
            )
            for engine in (OURS, CONTINUOUS)
        }
        rows.append(
            {
                "batch": shape.requests,
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
        shapes = tuple(Shape(batch, args.prompt_tokens, args.output_tokens) for batch in args.batch)
        job = Job(model, shapes, config["vocab_size"], seed=0)
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
