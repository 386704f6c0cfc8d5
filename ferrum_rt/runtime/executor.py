"""The ModelExecutor: slots, pages, the decoder and the sampler, on one thread and one device."""

from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from ferrum_rt.interfaces.model_executor import PageSwap, StepInput, StepOutput
from ferrum_rt.interfaces.sampler import Sampler, SamplingContext
from ferrum_rt.interfaces.types import MemoryUsage, ModelInfo
from ferrum_rt.kernels.batch import KvPages, TokenBatch
from ferrum_rt.runtime.models.decoder import Decoder
from ferrum_rt.runtime.step_rows import (
    StepRows,
    lay_out,
    memory_of,
    outputs_of,
    page_rows,
    parts_of,
    prompt_scores,
    table_changes,
)
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
        num_host_pages: int = 0,
    ) -> None:
        self.model_info = model_info
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.page_bytes = memory_of(0, cache).kv_cache // num_pages
        self._host_pages = [
            torch.empty((num_host_pages * block_size, *part.shape[1:]), dtype=part.dtype) for part in parts_of(cache)
        ]
        self._decoder, self._sampler, self._cache = decoder, sampler, cache
        self._block_size = block_size
        pages_per_slot = -(-model_info.max_model_len // block_size)
        self._block_tables = decoder.ops.zeros((num_slots, pages_per_slot), torch.int64)
        self._last_tokens = decoder.ops.zeros((num_slots,), torch.int64)
        self._rows = torch.arange(num_slots)

    @torch.inference_mode()
    def execute(self, step: StepInput) -> Future[StepOutput]:
        """Run one step to its end."""
        return finished(self._run(step))

    def _run(self, step: StepInput) -> StepOutput:
        self._take_over(step)
        rows = lay_out(step.batch)
        batch, context = self._batch(rows), SamplingContext(slots=rows.sampled_slots, positions=rows.sampled_positions)
        self._sampler.prepare(context)
        hidden = self._decoder.forward(batch, self._decoder.plan_attention(batch), self._cache)
        scores = [
            prompt_scores(partial(self._decoder.logits, hidden), self._sampler, item, span, self._rows)
            for item, span in zip(step.batch.prefills, rows.prefill_spans, strict=True)
        ]
        tokens = self._sampler.sample(self._decoder.logits(hidden, batch.logit_rows), context)
        self._last_tokens[rows.sampled_slots] = torch.tensor([item.token_id or 0 for item in tokens], dtype=torch.int64)
        return outputs_of(step.batch, tokens, scores)

    def close(self) -> None:
        self._sampler.close()

    def memory_usage(self) -> MemoryUsage:
        return memory_of(self._decoder.weights.num_bytes, self._cache)

    def _take_over(self, step: StepInput) -> None:
        """What changed in the slots and the pages since the last step."""
        for swap in step.swapped_out:  # first, for it counts as done even if the step fails
            self._move(swap, to_host=True)
        for assigned in step.assigned:
            self._sampler.assign(assigned.slot, assigned.sampling, assigned.history)
        at, pages = table_changes(step, self._block_tables.shape[1])
        if at:
            self._block_tables.view(-1)[at] = torch.tensor(pages)
        if step.copied:
            sources = page_rows(torch.tensor([item.source for item in step.copied]), self._block_size)
            targets = page_rows(torch.tensor([item.target for item in step.copied]), self._block_size)
            for layer in self._cache:
                self._decoder.ops.copy_kv(layer, sources, targets)
        for swap in step.swapped_in:
            self._move(swap, to_host=False)

    def _move(self, swap: PageSwap, *, to_host: bool) -> None:
        """A page, of all layers."""
        size = self._block_size
        for part, host in zip(parts_of(self._cache), self._host_pages, strict=True):
            ours = part[swap.page * size : (swap.page + 1) * size]
            theirs = host[swap.host_page * size : (swap.host_page + 1) * size]
            theirs.copy_(ours) if to_host else ours.copy_(theirs)

    def _batch(self, rows: StepRows) -> TokenBatch:
        decoded = self._last_tokens[rows.slots[: rows.num_decodes]]
        positions = torch.tensor(rows.positions)
        return TokenBatch(
            token_ids=torch.cat([decoded, torch.tensor(rows.known, dtype=torch.int64)]),
            positions=positions,
            kv_slots=self._kv_slots(torch.tensor(rows.slots), positions),
            logit_rows=torch.tensor(rows.logit_rows, dtype=torch.int64),
            spans=rows.spans,
            block_tables=self._block_tables,
            block_size=self._block_size,
        )

    def _kv_slots(self, slots: Tensor, positions: Tensor) -> Tensor:
        return self._block_tables[slots, positions // self._block_size] * self._block_size + positions % self._block_size
