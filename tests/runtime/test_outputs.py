"""What comes out, on the demo model in float32: seeds, samples, log-probabilities, constraints, callers' own processors."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from torch import Tensor

import ferrum_rt
from ferrum_rt import InferenceResponse
from ferrum_rt.interfaces.errors import FerrumError, RequestValidationError
from ferrum_rt.interfaces.types import TokenId, TokenLogprobs
from ferrum_rt.runtime.runtime import Runtime

pytestmark = pytest.mark.slow

PROMPT = "def mean(values):\n    return "
# A request of every kind. Its output must not depend on which others run beside it.
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.8},
    {"temperature": 1.0, "mirostat": {"tau": 3.0}},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 1.0, "logit_bias": {10: 5.0, 11: -5.0}},
    {"temperature": 1.0, "allowed_token_ids": list(range(200, 1200))},
    {"temperature": 1.0, "bad_words": ["self", "return"]},
    {"temperature": 1.0, "min_tokens": 10, "logprobs": 4},
    {"temperature": 1.0, "response_format": {"type": "regex", "definition": "[a-z_ ]{24}"}},
    {"temperature": 1.0, "response_format": {"type": "json_object"}},
    {"temperature": 1.0, "n": 3, "prompt_logprobs": 2},
    {"temperature": 0.7, "top_p": 0.8, "frequency_penalty": 0.2, "n": 2, "logprobs": 1, "stop": ["\n\n"]},
]


def open_demo(**config: Any) -> Runtime:
    return ferrum_rt.open_runtime(dtype="float32", **config)


def outputs(response: InferenceResponse | FerrumError) -> list[list[TokenId]]:
    assert isinstance(response, InferenceResponse), response
    return [output.token_ids for output in response.outputs] or [response.token_ids]


async def generate(engine: Runtime, requests: list[dict[str, Any]], max_tokens: int = 24) -> list[InferenceResponse]:
    """All at once, each with its number as its seed."""
    responses: list[InferenceResponse | None] = [None] * len(requests)

    async def run(index: int) -> None:
        responses[index] = await engine.infer(PROMPT, max_tokens=max_tokens, seed=index, **requests[index])

    async with anyio.create_task_group() as tasks:
        for index in range(len(requests)):
            tasks.start_soon(run, index)
    return [response for response in responses if response is not None]


async def test_a_seed_fixes_the_output_whatever_runs_beside_it() -> None:
    """Sixteen requests that differ in every field: each gets the same tokens alone, among the others, in chunks of seven
    prompt tokens, and when pages are so few that they preempt one another."""
    async with open_demo() as engine:
        alone = [outputs(await engine.infer(PROMPT, max_tokens=24, seed=i, **fields)) for i, fields in enumerate(REQUESTS)]
        assert [outputs(response) for response in await generate(engine, REQUESTS)] == alone
    async with open_demo(
        batching={"max_batched_tokens": 7},
        scheduler={"max_running_requests": 6},
        kv_cache={"num_pages": 14, "block_size": 4, "prefix_caching": False},
        max_model_len=56,
    ) as engine:
        assert [outputs(response) for response in await generate(engine, REQUESTS)] == alone
        assert engine.metrics().scheduler.preemptions > 0
    assert len({tuple(tokens[0]) for tokens in alone}) > 12, "outputs that are all alike would prove nothing"


async def test_a_seed_is_reported_and_gives_the_same_again() -> None:
    """Without a seed two requests differ; each says its seed, in the response and in the last chunk, and it repeats it."""
    async with open_demo() as engine:
        first, second = [await engine.infer(PROMPT, max_tokens=24, temperature=1.0) for _ in range(2)]
        assert first.token_ids != second.token_ids
        assert first.seed is not None
        async with engine.infer_stream(PROMPT, max_tokens=24, temperature=1.0, seed=first.seed) as chunks:
            received = [chunk async for chunk in chunks]
        assert [token for chunk in received for token in chunk.token_ids] == first.token_ids
        assert [chunk.seed for chunk in received] == [None] * (len(received) - 1) + [first.seed]


async def test_samples_share_the_pages_of_their_prompt() -> None:
    """Eight samples of a long prompt hold its full pages once, and each only its own beside them; the prompt is computed
    once; and each sample is what it is in any other number of samples."""
    prompt = "x = 1\n" * 40
    most_active = 0
    async with open_demo(kv_cache={"prefix_caching": False}) as engine:
        async with engine.infer_stream(prompt, n=8, max_tokens=20, seed=5, temperature=1.0, ignore_eos=True) as chunks:
            tokens: dict[int, list[TokenId]] = {index: [] for index in range(8)}
            async for chunk in chunks:
                tokens[chunk.index] += chunk.token_ids
                most_active = max(most_active, (await engine.status()).pages.active)
                if chunk.usage is not None:
                    length = chunk.usage.prompt_tokens
        steps = engine.metrics().steps
        fewer = await engine.infer(prompt, n=3, max_tokens=20, seed=5, temperature=1.0, ignore_eos=True)
        assert [output.token_ids for output in fewer.outputs] == [tokens[index] for index in range(3)]
    assert len({tuple(found) for found in tokens.values()}) == 8
    full, per_sample = length // 16, -(-(length + 20) // 16) - length // 16
    assert full + 8 <= most_active <= full + 8 * per_sample
    assert steps < 30


async def test_a_samples_stop_string_ends_that_sample_alone() -> None:
    """Each of several samples ends by itself: at a stop string, at the end token or at max_tokens, with its own usage."""
    async with open_demo() as engine:
        response = await engine.infer(PROMPT, n=12, max_tokens=8, temperature=1.0, seed=3, stop=["\n"])
        assert {output.finish_reason.value for output in response.outputs} == {"stop", "length"}
        for output in response.outputs:
            assert "\n" not in output.text
        assert response.usage.completion_tokens == sum(len(output.token_ids) for output in response.outputs)
        assert (await engine.status()).pages.active == 0


async def test_logprobs_equal_those_of_the_text_as_a_prompt() -> None:
    """What an output's logprobs say, the prompt_logprobs of prompt and output together say too; with chunked prefill
    and beside other requests."""
    async with open_demo(batching={"max_batched_tokens": 9}, scheduler={"max_running_requests": 9}) as engine:
        tokens = [TokenId(token) for token in range(300, 340)]
        first = await engine.infer(tokens, max_tokens=30, temperature=1.0, seed=2, logprobs=3, top_k=50)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: engine.infer(tokens, max_tokens=30, temperature=1.0))
            again = await engine.infer([*tokens, *first.token_ids], max_tokens=1, prompt_logprobs=3)
    assert first.logprobs is not None
    assert again.prompt_logprobs is not None
    assert len(again.prompt_logprobs) == len(tokens) + len(first.token_ids)
    assert again.prompt_logprobs[0].logprob is None
    for output, prompt in zip(first.logprobs, again.prompt_logprobs[len(tokens) :], strict=True):
        assert output.token_id == prompt.token_id
        assert output.logprob == pytest.approx(prompt.logprob, abs=1e-4)
        assert [item.token_id for item in output.top] == [item.token_id for item in prompt.top]
        assert [item.logprob for item in output.top] == pytest.approx([item.logprob for item in prompt.top], abs=1e-4)
        assert all(-60 < item.logprob <= 0 for item in output.top)


async def test_logprobs_say_where_their_tokens_are_in_the_text() -> None:
    """Byte offsets cut the output's text and the prompt's into the tokens, in ASCII and beyond."""
    prompt = "# Zürich → 東京 🙂\ns = '"
    async with open_demo() as engine:
        # Makes it write bytes that are no characters too, and no special token, which is not in the text.
        bias: dict[int, float] = dict.fromkeys(range(128, 256), 4.0) | dict.fromkeys(engine._model.eos_token_ids, -100.0)
        response = await engine.infer(
            prompt, max_tokens=60, temperature=1.5, seed=1, logprobs=0, prompt_logprobs=0, logit_bias=bias, ignore_eos=True
        )
    assert response.logprobs is not None
    assert response.prompt_logprobs is not None
    assert b"".join(pieces(prompt, response.prompt_logprobs[1:])).decode() == prompt
    assert response.prompt_logprobs[0].offset == 0
    for item, piece in zip(response.logprobs, pieces(response.text, response.logprobs), strict=True):
        if "\ufffd" not in item.token:
            assert item.token.encode() == piece
    assert any("\ufffd" in item.token for item in response.logprobs), "there should have been halves of characters"


def pieces(text: str, items: list[TokenLogprobs]) -> list[bytes]:
    """The text, cut at the offsets."""
    data, offsets = text.encode(), [item.offset for item in items]
    assert offsets == sorted(offsets)
    return [data[start:end] for start, end in zip(offsets, [*offsets[1:], len(data)], strict=True)]


async def test_the_seeds_cached_tokens_are_counted() -> None:
    """usage says how many of the prompt's tokens came from the prefix cache, for all samples of a request alike."""
    async with open_demo() as engine:
        prompt = "y = 2\n" * 30
        cold = await engine.infer(prompt, max_tokens=2)
        warm = await engine.infer(prompt, max_tokens=2, n=3)
        scored = await engine.infer(prompt, max_tokens=2, prompt_logprobs=0)
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == (warm.usage.prompt_tokens - 1) // 16 * 16
    assert warm.usage.prompt_tokens == cold.usage.prompt_tokens
    assert scored.usage.cached_tokens == 0  # every token is needed to score the next
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == scored.usage.prompt_tokens


class Shout:
    """A LogitsProcessor that allows what the given function says."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        self._change = change

    def apply(self, token_ids: list[TokenId], logits: Tensor) -> Any:
        return self._change(logits)


async def test_a_callers_processor_fails_alone() -> None:
    """Processors that raise or return nonsense fail their own request with its fault; a good one works; others stream on
    and get what they get anyway."""
    good = Shout(lambda logits: torch.full_like(logits, -math.inf).index_fill(0, torch.tensor([300]), 0.0))
    bad = [Shout(lambda logits: 1 / 0), Shout(lambda logits: logits[:-1]), Shout(lambda logits: None)]
    async with open_demo() as engine:
        expected = [outputs(await engine.infer(PROMPT, max_tokens=24, seed=i, temperature=1.0)) for i in range(4)]
        found: list[Any] = [None] * 8

        async def run(index: int, **fields: Any) -> None:
            try:
                found[index] = outputs(await engine.infer(PROMPT, max_tokens=24, **fields))
            except FerrumError as error:
                found[index] = error

        async with anyio.create_task_group() as tasks:
            for index, processor in enumerate([good, *bad]):
                tasks.start_soon(partial(run, index, logits_processors=[processor]))
            for index in range(4):
                tasks.start_soon(partial(run, 4 + index, seed=index, temperature=1.0))
        assert found[0] == [[300] * 24]
        for error, fault in zip(found[1:4], ("ZeroDivisionError", "shape", "NoneType"), strict=True):
            assert isinstance(error, RequestValidationError)
            assert fault in str(error)
        assert found[4:] == expected
        assert (await engine.health_check()).healthy


async def test_bad_words_and_min_tokens_hold() -> None:
    """No bad word appears, at the start of the text or after a space; and no output ends before min_tokens, by a stop
    string neither."""
    async with open_demo() as engine:
        for seed in range(6):
            fields: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 40}
            free = await engine.infer("def f(self):\n    return self.", **fields)
            word = next(word for word in free.text.replace("(", " ").replace(".", " ").split() if word.isidentifier())
            response = await engine.infer("def f(self):\n    return self.", bad_words=[word], **fields)
            assert f" {word} " not in f" {response.text} "
            long = await engine.infer("x = 1", min_tokens=20, stop=["\n"], **fields)
            assert len(long.token_ids) >= 20


async def test_rules_that_leave_nothing_end_the_request_with_their_names() -> None:
    """Rules that contradict one another end the request, with an error that names them."""
    async with open_demo() as engine:
        with pytest.raises(RequestValidationError, match="allowed_token_ids"):
            await engine.infer(
                PROMPT,
                allowed_token_ids=[300],
                logit_bias={300: 1.0},
                bad_words=["def"],
                response_format={"type": "regex", "definition": "[0-9]+"},
            )
        assert (await engine.infer(PROMPT, max_tokens=3)).token_ids


async def test_a_json_object_is_one() -> None:
    """json_object gives JSON, and the stop reason is the model's end token."""
    async with open_demo() as engine:
        response = await engine.infer(
            PROMPT, max_tokens=400, temperature=0.3, seed=1, response_format={"type": "json_object"}
        )
        if response.finish_reason.value == "eos":
            assert isinstance(json.loads(response.text), dict)
        assert response.text.startswith("{")
