"""The ModelExecutor: slots, pages, the decoder and the sampler, on one thread and one device."""

from concurrent.futures import Future

import torch
from torch import Tensor

from ferrum_rt.interfaces.model_executor import (
    DecodeOutput,
    PrefillInput,
    PrefillOutput,
    StepInput,
    StepOutput,
    UnifiedBatch,
)
from ferrum_rt.interfaces.sampler import Sampler, SamplingContext, TokenScores
from ferrum_rt.interfaces.types import MemoryUsage, ModelInfo
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch
from ferrum_rt.runtime.models.decoder import Decoder
from ferrum_rt.runtime.worker import finished


class DecoderExecutor:
    """Keeps, for each slot, its block table and the token it sampled last; a step brings only what changed."""

    def __init__(
        self,
        model_info: ModelInfo,
        decoder: Decoder,
        sampler: Sampler[Tensor],
        cache: list[KvPages],
        *,
        num_slots: int,
        num_pages: int,
        block_size: int,
    ) -> None:
        self.model_info = model_info
        self.num_slots = num_slots
        self.num_pages = num_pages
        self._decoder, self._sampler, self._cache = decoder, sampler, cache
        self._block_size = block_size
        pages_per_slot = -(-model_info.max_model_len // block_size)
        self._block_tables = decoder.ops.zeros((num_slots, pages_per_slot), torch.int64)
        self._last_tokens = decoder.ops.zeros((num_slots,), torch.int64)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> Future[StepOutput]:
        """Run one step to its end."""
        return finished(self._run(step))

    def _run(self, step: StepInput) -> StepOutput:
        self._take_over(step)
        batch, context = self._batch(step.batch)
        self._sampler.prepare(context)
        hidden = self._decoder.forward(batch, self._decoder.plan_attention(batch), self._cache)
        spans = batch.spans[len(step.batch.decodes) :]
        scores = [self._score(hidden, item, span) for item, span in zip(step.batch.prefills, spans, strict=True)]
        tokens = self._sampler.sample(self._decoder.logits(hidden, batch.logit_rows), context)

        self._last_tokens[list(context.slots)] = torch.tensor([item.token_id or 0 for item in tokens], dtype=torch.int64)
        following = iter(tokens)
        return StepOutput(
            [DecodeOutput(next(following)) for _ in step.batch.decodes],
            [
                PrefillOutput(next(following) if item.sample else None, scored)
                for item, scored in zip(step.batch.prefills, scores, strict=True)
            ],
        )

    def close(self) -> None:
        self._sampler.close()

    def memory_usage(self) -> MemoryUsage:
        tensors = (tensor for pages in self._cache for tensor in (pages.data, pages.scales) if tensor is not None)
        return MemoryUsage(weights=self._decoder.weights.num_bytes, kv_cache=sum(tensor.nbytes for tensor in tensors))

    def _take_over(self, step: StepInput) -> None:
        """What changed in the slots and the pages since the last step."""
        for assigned in step.assigned:
            pages = torch.tensor(assigned.pages)
            self._block_tables[assigned.slot, : len(pages)] = pages
            self._sampler.assign(assigned.slot, assigned.sampling, assigned.history)
        if step.appended:
            at = [item.slot for item in step.appended], [item.index for item in step.appended]
            self._block_tables[at] = torch.tensor([item.page for item in step.appended])
        if step.copied:
            within = torch.arange(self._block_size)
            sources = torch.tensor([[item.source] for item in step.copied]) * self._block_size + within
            targets = torch.tensor([[item.target] for item in step.copied]) * self._block_size + within
            for layer in self._cache:
                self._decoder.ops.copy_kv(layer, sources.view(-1), targets.view(-1))

    def _score(self, hidden: Tensor, item: PrefillInput, span: QuerySpan) -> list[TokenScores]:
        """Scores of the tokens that follow those of the chunk, as far as they are known."""
        if item.num_scores is None:
            return []
        targets = item.token_ids[1:] if item.token_after is None else [*item.token_ids[1:], item.token_after]
        scores: list[TokenScores] = []
        for start in range(0, len(targets), self.num_slots):
            part = targets[start : start + self.num_slots]
            rows = torch.arange(span.row + start, span.row + start + len(part))
            scores.extend(self._sampler.score(self._decoder.logits(hidden, rows), part, item.num_scores))
        return scores

    def _batch(self, items: UnifiedBatch) -> tuple[TokenBatch, SamplingContext]:
        """Rows in the order of the batch: a row per decode, then each prefill's rows."""
        spans = [QuerySpan(item.slot, row, 1, item.position) for row, item in enumerate(items.decodes)]
        slots = [item.slot for item in items.decodes]
        positions = [item.position for item in items.decodes]
        logit_rows = list(range(len(slots)))
        sampled_slots, sampled_positions = list(slots), [position + 1 for position in positions]
        known: list[int] = []
        row = len(slots)
        for item in items.prefills:
            count, end = len(item.token_ids), item.start + len(item.token_ids)
            spans.append(QuerySpan(item.slot, row, count, item.start))
            known.extend(item.token_ids)
            slots.extend([item.slot] * count)
            positions.extend(range(item.start, end))
            row += count
            if item.sample:
                logit_rows.append(row - 1)
                sampled_slots.append(item.slot)
                sampled_positions.append(end)
        decoded = self._last_tokens[slots[: len(items.decodes)]]
        at = torch.tensor(positions)
        batch = TokenBatch(
            token_ids=torch.cat([decoded, torch.tensor(known, dtype=torch.int64)]),
            positions=at,
            kv_slots=self._kv_slots(torch.tensor(slots), at),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
            spans=spans,
            block_tables=self._block_tables,
            block_size=self._block_size,
        )
        return batch, SamplingContext(slots=sampled_slots, positions=sampled_positions)

    def _kv_slots(self, slots: Tensor, positions: Tensor) -> Tensor:
        return self._block_tables[slots, positions // self._block_size] * self._block_size + positions % self._block_size
