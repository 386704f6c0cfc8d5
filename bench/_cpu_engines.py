"""What the benches that compare engines on the CPU share: the checkpoint, the requests, and engines that generate from them.

Ours, and transformers in its two ways. Each engine is opened in a process of its own (``in_process``).
"""

import multiprocessing
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio

import ferrum_rt

T = TypeVar("T")
TokenIds = list[int]
Generate = Callable[[list[TokenIds], int], Awaitable[list[TokenIds]]]
"""From prompts and a number of tokens to what was generated after each prompt."""

WARM_UP_TOKENS = 8


class Shape(NamedTuple):
    """So many requests at once, each of so many tokens in and out."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.output_tokens


class Job(NamedTuple):
    """What one process does with the checkpoint in ``model``; ``dtype`` None is the checkpoint's own."""

    model: Path
    shapes: tuple[Shape, ...]
    vocab_size: int
    seed: int
    dtype: str | None = None

    @property
    def max_requests(self) -> int:
        return max(shape.requests for shape in self.shapes)

    @property
    def max_length(self) -> int:
        return max(shape.length for shape in self.shapes)

    @property
    def max_batched_tokens(self) -> int:
        """Room for all the prompts in one step."""
        return max(512, *(shape.requests * shape.prompt_tokens for shape in self.shapes))

    def num_pages(self, page_size: int) -> int:
        return max(shape.requests * -(-shape.length // page_size) for shape in self.shapes)

    def prompts(self, shape: Shape, purpose: str) -> list[TokenIds]:
        rng = random.Random(f"{self.seed} {tuple(shape)} {purpose}")
        return [[rng.randrange(self.vocab_size) for _ in range(shape.prompt_tokens)] for _ in range(shape.requests)]


class Measured(NamedTuple):
    seconds: float
    outputs: list[TokenIds]


# -- the engines --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ours(job: Job) -> AsyncIterator[Generate]:
    async with ferrum_rt.open_runtime(
        job.model,
        scheduler={"max_running_requests": job.max_requests},
        batching={"max_batched_tokens": job.max_batched_tokens},
        max_model_len=job.max_length,
        dtype=job.dtype,
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
        num_blocks=8 + 2 * job.num_pages(page_size),
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


# -- in a process of its own ----------------------------------------------------------------------------------------------


def measure(engine: Callable[[Job], AbstractAsyncContextManager[Generate]], job: Job) -> dict[Shape, Measured]:
    """Raises RuntimeError where a request ends early."""

    async def run() -> dict[Shape, Measured]:
        measured = {}
        async with engine(job) as generate:
            for shape in job.shapes:
                await generate(job.prompts(shape, "warm-up"), min(WARM_UP_TOKENS, shape.output_tokens))
                prompts = job.prompts(shape, "measured")
                began = time.perf_counter()
                outputs = await generate(prompts, shape.output_tokens)
                measured[shape] = Measured(time.perf_counter() - began, outputs)
                check_lengths(shape, outputs)
        return measured

    return anyio.run(run, backend_options={"use_uvloop": True})


def check_lengths(shape: Shape, outputs: Sequence[TokenIds]) -> None:
    lengths = [len(output) for output in outputs]
    if lengths != [shape.output_tokens] * shape.requests:
        raise RuntimeError(f"asked for {shape.requests} times {shape.output_tokens} tokens, got {lengths}")


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


def agreement(outputs: Sequence[TokenIds], reference: Sequence[TokenIds]) -> float:
    """The share of generated tokens before the first that differs. Rounding alone makes random weights part early, since
    their logits lie close together: compare ours with what transformers' two ways have in common."""
    pairs = [zip(mine, other, strict=True) for mine, other in zip(outputs, reference, strict=True)]
    equal = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pair)) for pair in pairs]
    return sum(equal) / sum(len(output) for output in outputs)
