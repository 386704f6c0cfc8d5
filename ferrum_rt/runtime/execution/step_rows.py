"""What every executor does alike: a step's inputs as rows, and its results as outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from ferrum_rt.interfaces.sampler import SampledToken, Sampler, SamplingContext, TokenScores
from ferrum_rt.interfaces.types import MemoryUsage, TokenId
from ferrum_rt.kernels.batch import KvPages, QuerySpan


@dataclass(slots=True)
class StepRows:
    """A row per token, in the order of the batch: one for each decode, then each prefill's. The first ``num_decodes`` tokens
    are those that their slots sampled last, ``known`` are the others. Row ``logit_rows[i]`` is sampled from, for slot
    ``sampled_slots[i]``, and the token drawn will stand at ``sampled_positions[i]``."""

    num_decodes: int
    slots: list[int]
    positions: list[int]
    known: list[int]
    spans: list[QuerySpan]
    logit_rows: list[int]
    sampled_slots: list[int]
    sampled_positions: list[int]

    @property
    def prefill_spans(self) -> list[QuerySpan]:
        return self.spans[self.num_decodes :]

    def context(self, sampled: Sequence[int], ahead: int = 0) -> SamplingContext:
        """Of these of the sampled rows, so many rounds later."""
        return SamplingContext(
            slots=[self.sampled_slots[row] for row in sampled],
            positions=[self.sampled_positions[row] + ahead for row in sampled],
        )


def lay_out(items: UnifiedBatch) -> StepRows:
    """The rows of a step."""
    decodes = items.decodes
    slots = [item.slot for item in decodes]
    positions = [item.position for item in decodes]
    rows = StepRows(
        num_decodes=len(slots),
        slots=slots,
        positions=positions,
        known=[],
        spans=[QuerySpan(item.slot, row, 1, item.position) for row, item in enumerate(decodes)],
        logit_rows=list(range(len(slots))),
        sampled_slots=list(slots),
        sampled_positions=[position + 1 for position in positions],
    )
    for item in items.prefills:
        count, end = len(item.token_ids), item.start + len(item.token_ids)
        rows.spans.append(QuerySpan(item.slot, len(slots), count, item.start))
        rows.known.extend(item.token_ids)
        slots.extend([item.slot] * count)
        positions.extend(range(item.start, end))
        if item.sample:
            rows.logit_rows.append(len(slots) - 1)
            rows.sampled_slots.append(item.slot)
            rows.sampled_positions.append(end)
    return rows


def table_changes(step: StepInput, pages_per_slot: int) -> tuple[list[int], list[int]]:
    """Where in the block tables [slots, pages_per_slot], seen as one row, something changed, and the pages that now stand
    there; no place twice."""
    changes: dict[int, int] = {}
    for assigned in step.assigned:
        first = assigned.slot * pages_per_slot
        changes.update(enumerate(assigned.pages, first))
    for appended in step.appended:
        changes[appended.slot * pages_per_slot + appended.index] = appended.page
    return list(changes), list(changes.values())


def page_rows(pages: Tensor, block_size: int) -> Tensor:
    """The rows of a layer's pages that belong to ``pages`` [M]: [M * block_size]."""
    return (pages[:, None] * block_size + torch.arange(block_size, device=pages.device)).view(-1)


def scored_tokens(item: PrefillInput) -> list[TokenId]:
    """The tokens that a chunk gives scores of: those that follow its own, as far as they are known."""
    if item.num_scores is None:
        return []
    return item.token_ids[1:] if item.token_after is None else [*item.token_ids[1:], item.token_after]


def prompt_scores(
    logits_of: Callable[[Tensor], Tensor], sampler: Sampler[Tensor], item: PrefillInput, span: QuerySpan, rows: Tensor
) -> list[TokenScores]:
    """The scores of a chunk, if it is to give any. ``logits_of`` takes as many rows at a time as ``rows`` has, which are 0,
    1, 2, … on the device."""
    targets = scored_tokens(item)
    scores: list[TokenScores] = []
    for start in range(0, len(targets), len(rows)):
        part = targets[start : start + len(rows)]
        scores.extend(sampler.score(logits_of(rows[: len(part)] + (span.row + start)), part, item.num_scores or 0))
    return scores


def outputs_of(items: UnifiedBatch, tokens: Sequence[SampledToken], scores: Sequence[Sequence[TokenScores]]) -> StepOutput:
    """``tokens`` by sampled row, ``scores`` by prefill."""
    following = iter(tokens)
    return StepOutput(
        [DecodeOutput(next(following)) for _ in items.decodes],
        [
            PrefillOutput(next(following) if item.sample else None, scored)
            for item, scored in zip(items.prefills, scores, strict=True)
        ],
    )


def memory_of(weight_bytes: int, cache: Sequence[KvPages]) -> MemoryUsage:
    """Weights and pages."""
    return MemoryUsage(weights=weight_bytes, kv_cache=sum(part.nbytes for part in parts_of(cache)))


def parts_of(cache: Sequence[KvPages]) -> list[Tensor]:
    """The tensors that the pages of all layers are in, by rows of a token each."""
    return [part for pages in cache for part in (pages.data, pages.scales) if part is not None]
