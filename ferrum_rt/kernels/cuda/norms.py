"""RMS norm weights as FlashInfer takes them."""

from typing import NamedTuple

import torch
from torch import Tensor


class NarrowWeight(NamedTuple):
    """A norm's weight [dim] in the activations' type; ``is_offset`` if it is the weight less 1."""

    weight: Tensor
    is_offset: bool


def narrow(weight: Tensor, dtype: torch.dtype, device: str) -> NarrowWeight:
    """FlashInfer reads weights as if they had the activations' type, and does not look whether they have. Ours are float32
    with the family's offset added, for 1 + w has more bits than w; its ``gemma_`` norms add the 1 themselves. Whichever form
    lies nearer is taken, and that of a checkpoint in ``dtype`` is exact."""
    wide = weight.float()
    plain, offset = wide.to(dtype), (wide - 1).to(dtype)
    is_offset = bool((offset.float() + 1 - wide).abs().max() < (plain.float() - wide).abs().max())
    return NarrowWeight((offset if is_offset else plain).to(device).contiguous(), is_offset)


class HeadRun(NamedTuple):
    """Heads from ``first`` to before ``end``, which share a ``weight`` [dim]."""

    first: int
    end: int
    weight: Tensor


def head_runs(weight: Tensor, dtype: torch.dtype, device: str) -> list[HeadRun] | None:
    """weight [heads, dim] as runs of equal rows: FlashInfer norms all heads of a call with one weight. The queries' and the
    keys' make two. None where ``dtype`` would hold the weights less 1 better, for only its norm of whole rows adds the 1."""
    is_new = (weight[1:] != weight[:-1]).any(dim=1).tolist()
    starts = [0, *(row for row, new in enumerate(is_new, 1) if new)]
    narrowed = [narrow(weight[first], dtype, device) for first in starts]
    if any(norm.is_offset for norm in narrowed):
        return None
    return [
        HeadRun(first, end, norm.weight)
        for first, end, norm in zip(starts, [*starts[1:], len(weight)], narrowed, strict=True)
    ]
