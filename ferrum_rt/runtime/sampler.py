"""The Sampler: one configuration per slot, rows of one step drawn together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ferrum_rt.interfaces.sampler import SamplingConfig, SamplingContext
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.kernels.sampling import sample_all, sample_top, uniform


class BatchSampler:
    """Greedy rows cost one reduction; the others are drawn in two groups, by whether they need the vocabulary sorted.
    The grouping looks at each row alone, so it cannot change what a row draws."""

    def __init__(self, num_slots: int) -> None:
        self._configs = [SamplingConfig()] * num_slots

    def assign(self, slot: int, config: SamplingConfig) -> None:
        self._configs[slot] = config

    def sample(self, logits: Tensor, context: SamplingContext) -> Sequence[TokenId | None]:
        """A token per row of ``logits`` [rows, vocabulary]; None for a row without a finite maximum."""
        highest, tokens = logits.max(dim=-1)
        configs = [self._configs[slot] for slot in context.slots]
        plain = [row for row, config in enumerate(configs) if config.temperature > 0 and not _needs_sort(config)]
        sorted_ = [row for row, config in enumerate(configs) if config.temperature > 0 and _needs_sort(config)]
        for rows in (plain, sorted_):
            if rows:
                tokens[rows] = self._draw(logits, configs, context, rows, with_sort=rows is sorted_)
        is_sound = torch.isfinite(highest).tolist()
        return [TokenId(token) if sound else None for token, sound in zip(tokens.tolist(), is_sound, strict=True)]

    def _draw(
        self,
        logits: Tensor,
        configs: list[SamplingConfig],
        context: SamplingContext,
        rows: list[int],
        *,
        with_sort: bool,
    ) -> Tensor:
        picked = [configs[row] for row in rows]
        chosen = logits[rows].nan_to_num(0.0).float()
        temperature = torch.tensor([config.temperature for config in picked])
        min_p = torch.tensor([config.min_p for config in picked])
        draws = uniform(
            torch.tensor([config.seed for config in picked]),
            torch.tensor([context.positions[row] for row in rows]),
        )
        if not with_sort:
            return sample_all(chosen, temperature, min_p, draws)
        top_k = torch.tensor([config.top_k for config in picked])
        top_p = torch.tensor([config.top_p for config in picked])
        return sample_top(chosen, temperature, top_k, top_p, min_p, draws)


def _needs_sort(config: SamplingConfig) -> bool:
    return config.top_k > 0 or config.top_p < 1.0
