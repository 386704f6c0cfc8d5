"""The ModelExecutor: slots, pages, the decoder and the sampler, on one thread and one device."""

from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from ferrum_rt.interfaces.model_executor import DecodeOutput, PageSwap, StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SampledToken, Sampler, SamplingContext, TokenScores
from ferrum_rt.interfaces.types import MemoryUsage, ModelInfo, TokenId
from ferrum_rt.kernels.batch import KvPages
from ferrum_rt.kernels.cpu import CpuOps
from ferrum_rt.runtime.execution.host_inputs import HostInputs
from ferrum_rt.runtime.execution.sampler import not_numbers
from ferrum_rt.runtime.execution.step_rows import (
    StepRows,
    lay_out,
    memory_of,
    outputs_of,
    page_rows,
    parts_of,
    prompt_scores,
)
from ferrum_rt.runtime.execution.step_runner import MAX_ROUNDS, StepLogits, StepRunner
from ferrum_rt.runtime.models.decoder import Decoder
from ferrum_rt.runtime.threads.worker import finished


class DecoderExecutor:
    """Keeps, for each slot, its block table and the token it sampled last; a step brings only what changed. Tokens come from
    the runner, or from the sampler where more is asked than it can."""

    def __init__(
        self,
        model_info: ModelInfo,
        decoder: Decoder,
        ops: CpuOps,
        inputs: HostInputs,
        runner: StepRunner,
        sampler: Sampler[Tensor],
        cache: list[KvPages],
        *,
        num_slots: int,
        num_pages: int,
        block_size: int,
        num_host_pages: int = 0,
    ) -> None:
        self.model_info = model_info
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.max_rounds = MAX_ROUNDS
        self.page_bytes = memory_of(0, cache).kv_cache // num_pages
        self._host_pages = [
            torch.empty((num_host_pages * block_size, *part.shape[1:]), dtype=part.dtype) for part in parts_of(cache)
        ]
        self._decoder, self._ops, self._inputs, self._runner = decoder, ops, inputs, runner
        self._sampler, self._cache = sampler, cache
        self._block_size = block_size
        self._is_from_runner = [True] * num_slots
        self._rows = torch.arange(num_slots)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> Future[StepOutput]:
        """Run one step to its end."""
        return finished(self._run(step))

    def _run(self, step: StepInput) -> StepOutput:
        self._take_over(step)
        rows = lay_out(step.batch)
        if step.batch.num_rounds > 1:
            return self._run_rounds(rows, step.batch.num_rounds)
        others = self._for_sampler(rows)
        context = rows.context(others)
        if others:
            self._sampler.prepare(context)
        self._inputs.fill(rows)
        scores: list[list[TokenScores]] = [[] for _ in step.batch.prefills]

        def score_prompts(hidden: Tensor) -> None:
            logits_of = partial(self._decoder.logits, hidden)
            for index, (item, span) in enumerate(zip(step.batch.prefills, rows.prefill_spans, strict=True)):
                scores[index] = prompt_scores(logits_of, self._sampler, item, span, self._rows)

        is_scored = any(item.num_scores is not None for item in step.batch.prefills)
        tokens = self._choose(self._runner.run(score_prompts if is_scored else None), others, context)
        self._inputs.keep(rows.sampled_slots, [item.token_id for item in tokens])
        return outputs_of(step.batch, tokens, scores)

    def _run_rounds(self, rows: StepRows, num_rounds: int) -> StepOutput:
        """In one call if all tokens are the runner's; else the sampler draws after each round."""
        self._inputs.fill(rows)
        others = self._for_sampler(rows)
        if others:
            rounds = [self._choose(self._runner.run(), others, rows.context(others))]
            while len(rounds) < num_rounds:
                self._inputs.advance([item.token_id for item in rounds[-1]])
                rounds.append(self._choose(self._runner.run(), others, rows.context(others, ahead=len(rounds))))
        else:
            rounds = [[_sampled(token) for token in found] for found in self._runner.run_rounds(num_rounds)]
        self._inputs.keep(rows.sampled_slots, [item.token_id for item in rounds[-1]])
        return StepOutput([DecodeOutput(first, later) for first, *later in zip(*rounds, strict=True)], [])

    def _for_sampler(self, rows: StepRows) -> list[int]:
        """Those of the sampled rows that the sampler has to draw."""
        return [row for row, slot in enumerate(rows.sampled_slots) if not self._is_from_runner[slot]]

    def _choose(self, logits: StepLogits, others: list[int], context: SamplingContext) -> list[SampledToken]:
        """The runner's tokens, but for the rows ``others``, of which ``context`` tells."""
        tokens = [_sampled(token) for token in logits.tokens]
        if others:
            is_all = len(others) == len(tokens)
            drawn = self._sampler.sample(logits.rows[: len(tokens)] if is_all else logits.rows[others], context)
            for row, token in zip(others, drawn, strict=True):
                tokens[row] = token
        return tokens

    def close(self) -> None:
        self._sampler.close()
        self._ops.close()

    def memory_usage(self) -> MemoryUsage:
        return memory_of(self._decoder.weights.num_bytes, self._cache)

    def _take_over(self, step: StepInput) -> None:
        """What changed in the slots and the pages since the last step."""
        for swap in step.swapped_out:  # first, for it counts as done even if the step fails
            self._move(swap, to_host=True)
        for assigned in step.assigned:
            self._is_from_runner[assigned.slot] = self._runner.assign(assigned.slot, assigned.sampling)
            self._sampler.assign(assigned.slot, assigned.sampling, assigned.history)
        self._inputs.take_over(step)
        if step.copied:
            sources = page_rows(torch.tensor([item.source for item in step.copied]), self._block_size)
            targets = page_rows(torch.tensor([item.target for item in step.copied]), self._block_size)
            for layer in self._cache:
                self._ops.copy_kv(layer, sources, targets)
        for swap in step.swapped_in:
            self._move(swap, to_host=False)

    def _move(self, swap: PageSwap, *, to_host: bool) -> None:
        """A page, of all layers."""
        size = self._block_size
        for part, host in zip(parts_of(self._cache), self._host_pages, strict=True):
            ours = part[swap.page * size : (swap.page + 1) * size]
            theirs = host[swap.host_page * size : (swap.host_page + 1) * size]
            theirs.copy_(ours) if to_host else ours.copy_(theirs)


def _sampled(token: TokenId | None) -> SampledToken:
    return SampledToken(token) if token is not None else SampledToken(None, error=not_numbers())
