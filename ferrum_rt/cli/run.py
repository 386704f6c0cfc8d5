"""ferrum-rt run: one prompt and its continuation."""

import argparse
import sys
import time
from contextlib import AbstractAsyncContextManager

import anyio
import msgspec

from ferrum_rt.cli.options import open_engine, sampling_params
from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.types import SamplingParams, StreamChunk, to_builtins


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt and what the model makes of it, as it comes; or all of it as JSON."""
    params, opening = sampling_params(arguments), open_engine(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    show = _print_json if arguments.json else _print_stream
    anyio.run(show, opening, prompt, params, backend_options={"use_uvloop": True})
    return 0


async def _print_stream(opening: AbstractAsyncContextManager[InferenceEngine], prompt: str, params: SamplingParams) -> None:
    async with opening as engine:
        submitted = time.monotonic()
        async with engine.infer_stream(prompt, sampling_params=params) as chunks:
            last = await anext(chunks)  # a prompt that is refused is not printed
            first_at = time.monotonic()
            print(prompt, last.text, sep="", end="", flush=True)
            try:
                async for last in chunks:
                    print(last.text, end="", flush=True)
            finally:
                print(flush=True)
        print(_summary(last, first_at - submitted, time.monotonic() - first_at), file=sys.stderr)


async def _print_json(opening: AbstractAsyncContextManager[InferenceEngine], prompt: str, params: SamplingParams) -> None:
    async with opening as engine:
        response = await engine.infer(prompt, sampling_params=params)
        model = (await engine.status()).model
    report = {"model": None if model is None else model.id, "prompt": prompt} | to_builtins(response)
    print(msgspec.json.encode(report).decode())


def _summary(last: StreamChunk, ttft_s: float, decode_s: float) -> str:
    usage, reason = last.usage, last.finish_reason
    assert usage is not None, "the last chunk has the usage"
    assert reason is not None, "and the reason"
    parts = [
        f"prompt tokens: {usage.prompt_tokens}",
        f"output tokens: {usage.completion_tokens}",
        f"time to first token: {ttft_s:.3f} s",
    ]
    if usage.completion_tokens > 1:
        parts.append(f"tokens/s: {(usage.completion_tokens - 1) / decode_s:.1f}")
    return ", ".join([*parts, f"finish reason: {reason.value}"])
