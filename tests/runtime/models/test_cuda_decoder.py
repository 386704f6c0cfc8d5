"""The demo model through CudaOps, on the emulation of FlashInfer, says what it says through ReferenceOps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.reference import ReferenceOps
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.loader import DEMO_MODEL
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.models.decoder import Decoder, load_weights
from ferrum_rt.runtime.models.families import parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader
from tests.fakes import flashinfer as emulation

BLOCK_SIZE, MAX_PAGES, MAX_TOKENS = 16, 8, 64
PROMPTS = ["def ", "import os\nimport sys\n\n\nclass Parser:\n    def __init__(self, ", "    for i in range("]

Plan = Callable[[list[int], list[int], Tensor], Any]


class Loop:
    """A batch of sequences with block tables, pages and greedy tokens: what an executor does, without its bookkeeping."""

    def __init__(self, ops: ReferenceOps, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        spec = parse_config(read_json(DEMO_MODEL / "config.json", ModelError))
        weights = load_weights(spec, CheckpointReader(DEMO_MODEL), ops, dtype, 128, lambda done, total: None)
        self.decoder = Decoder(spec, weights, ops, dtype, MAX_TOKENS, len(PROMPTS))
        num_tokens = len(PROMPTS) * MAX_PAGES * BLOCK_SIZE
        self.cache: list[KvPages] = [
            allocate_pages(num_tokens, spec.num_kv_heads, spec.head_dim, kv_dtype, "cpu") for _ in spec.layers
        ]
        order = torch.randperm(len(PROMPTS) * MAX_PAGES, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(len(PROMPTS), MAX_PAGES)

    def step(self, tokens: list[list[int]], starts: list[int], plan: Plan | None) -> Tensor:
        """[slots, vocabulary]: the logits after these tokens, which stand at ``starts`` and following of slots 0, 1, 2."""
        spans, row = [], 0
        for slot, (part, start) in enumerate(zip(tokens, starts, strict=True)):
            spans.append(QuerySpan(slot, row, len(part), start))
            row += len(part)
        slots = torch.tensor([span.slot for span in spans for _ in range(span.num_tokens)])
        at = torch.cat([torch.arange(span.start, span.start + span.num_tokens) for span in spans])
        kv_slots = self.tables[slots, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        last = torch.tensor([span.row + span.num_tokens - 1 for span in spans])
        ids = torch.tensor([token for part in tokens for token in part])
        batch = TokenBatch(ids, at, kv_slots, last, spans, self.tables, BLOCK_SIZE)
        if plan is None:
            planned = self.decoder.plan_attention(batch)
        else:
            planned = plan(list(range(len(tokens))), [start + 1 for start in starts], self.tables)
        return self.decoder.logits(self.decoder.forward(batch, planned, self.cache), last)

    def generate(self, prompts: list[list[int]], count: int, plan: Plan | None = None) -> list[list[int]]:
        """``count`` greedy tokens for each prompt; where all sequences decode, ``plan`` is used if there is one."""
        sequences = [list(prompt) for prompt in prompts]
        for slot, logits in self.walk(sequences, plan):
            sequences[slot].append(int(logits.argmax()))
            if all(len(tokens) >= len(prompt) + count for tokens, prompt in zip(sequences, prompts, strict=True)):
                break
        return [tokens[len(prompt) :][:count] for tokens, prompt in zip(sequences, prompts, strict=True)]

    def gaps(self, prompts: list[list[int]], outputs: list[list[int]]) -> list[float]:
        """How far below the best each output's tokens are, in units of the best."""
        texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        sequences, gaps = [list(prompt) for prompt in prompts], []
        for slot, logits in self.walk(sequences, None):
            at = len(sequences[slot])
            token = texts[slot][at] if at < len(texts[slot]) else 0
            if at < len(texts[slot]):
                gaps.append(float((logits.max() - logits[token]) / logits.max().abs()))
            sequences[slot].append(token)
            if len(gaps) == sum(map(len, outputs)):
                break
        return gaps

    def walk(self, sequences: list[list[int]], plan: Plan | None) -> Iterator[tuple[int, Tensor]]:
        """(slot, logits) of each token that is due; the caller appends it. Prompts are computed five tokens at a time, so
        that some steps are mixed."""
        computed = [0] * len(sequences)
        while True:
            parts = [tokens[done : done + 5] for tokens, done in zip(sequences, computed, strict=True)]
            logits = self.step(parts, computed, plan if all(len(part) == 1 for part in parts) else None)
            for slot, part in enumerate(parts):
                computed[slot] += len(part)
                if computed[slot] == len(sequences[slot]):
                    yield slot, logits[slot].float()


@pytest.mark.slow
@pytest.mark.parametrize("is_replayed", [False, True], ids=["eager", "replayed"])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float16, torch.float16), (torch.float16, torch.float8_e4m3fn), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_greedy_tokens_are_the_references(dtype: torch.dtype, kv_dtype: torch.dtype, is_replayed: bool) -> None:
    """In prefills by chunks, mixed steps and decodes, these eager or planned anew for each replay of a graph: in float16 the
    very tokens; in bfloat16 tokens that the reference finds as good as its own, within the last two bits of a logit."""
    tokenizer = HfTokenizerFactory(()).load(DEMO_MODEL)
    prompts = [list[int](ids) for ids in tokenizer.encode_batch(PROMPTS, add_special_tokens=False)]
    ops = CudaOps("cpu", block_size=BLOCK_SIZE, kv_dtype=kv_dtype, dtype=dtype, flashinfer=emulation)
    with torch.inference_mode():
        ours, theirs = Loop(ops, dtype, kv_dtype), Loop(ReferenceOps(), dtype, kv_dtype)
        plan: Plan | None = None
        if is_replayed:
            kinds = list(dict.fromkeys(layer.attention for layer in ours.decoder.weights.layers))
            decode = ops.decode_attention(len(PROMPTS), MAX_PAGES, kinds)

            def plan(slots: list[int], num_tokens: list[int], tables: Tensor) -> Any:
                decode.replan(slots, num_tokens, tables)
                return decode.plan

        said = ours.generate(prompts, 24, plan)
        if dtype == torch.float16:
            assert said == theirs.generate(prompts, 24)
        else:
            assert max(theirs.gaps(prompts, said)) < 2 * torch.finfo(dtype).eps
        assert len({tuple(output) for output in said}) == len(PROMPTS)
