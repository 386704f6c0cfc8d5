"""Each family computes what transformers computes, however its tokens are batched."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ferrum_rt import InferenceResponse
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch
from ferrum_rt.runtime.execution.executor import DecoderExecutor
from ferrum_rt.runtime.loading.loader import load_model
from ferrum_rt.runtime.runtime import open_runtime
from tests.checkpoints import FAMILIES, save_checkpoint, save_tokenizer

PROMPTS = [[(7 * row + 3 * column) % 300 + 3 for column in range(5 + 6 * row)] for row in range(8)]
NUM_TOKENS = 64


class Family:
    """A checkpoint, and what transformers makes of it."""

    def __init__(self, kind: str, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.directory = directory
        save_checkpoint(kind, directory)
        save_tokenizer(directory)
        # Eager attention is the one that applies soft caps.
        self.peer: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        self.expected = [self._generate(prompt) for prompt in PROMPTS]

    def _generate(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS, "eos_token_id": None}
        output = self.peer.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


async def generate(family: Family, prompts: list[list[int]], **config: Any) -> tuple[list[InferenceResponse], int]:
    """The responses to all prompts at once, and how many preemptions that took."""
    async with open_runtime(family.directory, **config) as engine:
        results = await engine.infer_batch(prompts, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        responses = [result for result in results if isinstance(result, InferenceResponse)]
        assert len(responses) == len(prompts), results
        return responses, engine.metrics().scheduler.preemptions


def tokens_of(responses: list[InferenceResponse]) -> list[list[int]]:
    return [list(response.token_ids) for response in responses]


@pytest.mark.slow
def test_logits_equal_transformers(family: Family) -> None:
    """float32 logits are within 1e-4 of transformers' at every position."""
    executor = load_model(build_config(str(family.directory), None, {"dtype": "float32"})).executor
    assert isinstance(executor, DecoderExecutor)
    decoder, prompt = executor._decoder, PROMPTS[-1]
    with torch.inference_mode():
        expected = family.peer(torch.tensor([prompt])).logits[0]
        rows = torch.arange(len(prompt))
        batch = TokenBatch(
            token_ids=torch.tensor(prompt),
            positions=rows,
            kv_slots=rows,
            logit_rows=rows,
            spans=[QuerySpan(slot=0, row=0, num_tokens=len(prompt), start=0)],
            block_tables=torch.arange(64)[None],
            block_size=16,
        )
        logits = decoder.logits(decoder.forward(batch, decoder.plan_attention(batch), executor._cache), rows)
    assert expected.std() > 0.1, "flat logits would prove nothing"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
async def test_greedy_tokens_solo(family: Family) -> None:
    """Alone in its batch a prompt gets the same 64 greedy tokens as from transformers."""
    responses, _ = await generate(family, PROMPTS[-1:])
    assert tokens_of(responses) == family.expected[-1:]


@pytest.mark.slow
async def test_greedy_tokens_in_a_mixed_batch(family: Family) -> None:
    """Eight prompts of different lengths at once each get their own tokens."""
    responses, _ = await generate(family, PROMPTS)
    assert tokens_of(responses) == family.expected


@pytest.mark.slow
async def test_greedy_tokens_with_chunked_prefill(family: Family) -> None:
    """A prompt computed seven tokens at a time gets the same tokens."""
    responses, _ = await generate(
        family, PROMPTS[-1:], batching={"max_batched_tokens": 7}, scheduler={"max_running_requests": 1}
    )
    assert tokens_of(responses) == family.expected[-1:]


@pytest.mark.slow
async def test_greedy_tokens_on_a_prefix_hit(family: Family) -> None:
    """A prompt whose first pages come from the prefix cache gets the same tokens."""
    responses, _ = await generate(family, [PROMPTS[-1]] * 2, scheduler={"max_running_requests": 1})
    assert [response.usage.cached_tokens for response in responses] == [0, 32]
    assert tokens_of(responses) == family.expected[-1:] * 2


@pytest.mark.slow
async def test_greedy_tokens_after_preemption(family: Family) -> None:
    """Sequences that lost their pages to others and were computed again get the same tokens."""
    responses, preemptions = await generate(
        family, PROMPTS, max_model_len=128, kv_cache={"num_pages": 20, "prefix_caching": False}
    )
    assert preemptions > 0
    assert tokens_of(responses) == family.expected
