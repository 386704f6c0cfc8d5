"""Drawing tokens from logits, on whatever device they are.

Randomness is one uniform number per token, computed from (seed, position) alone, then the inverse of the cumulative
distribution: what else is in the batch cannot change a draw.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) for each pair of int64, by two rounds of SplitMix64's finalizer (Steele et al., OOPSLA 2014)."""
    mixed = _mix(_mix(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)
    return ((mixed >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def sample_all(logits: Tensor, temperature: Tensor, min_p: Tensor, draws: Tensor) -> Tensor:
    """Draw from rows whose whole vocabulary is in play, but for ``min_p``. All arguments [R] beside logits [R, V]."""
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    probs.masked_fill_(probs < min_p[:, None] * probs.amax(dim=-1, keepdim=True), 0.0)
    return _invert(probs, draws)


def sample_top(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, draws: Tensor) -> Tensor:
    """Draw from the ``top_k`` likeliest (0 for all), of them the fewest that reach ``top_p``, of them those of at least
    ``min_p`` times the likeliest: the order in which transformers applies them."""
    probs, ids = torch.softmax(logits / temperature[:, None], dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[1], device=probs.device)
    probs.masked_fill_((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0.0)
    before = probs.cumsum(dim=-1) - probs
    probs.masked_fill_(before >= top_p[:, None] * probs.sum(dim=-1, keepdim=True), 0.0)
    probs.masked_fill_(probs < min_p[:, None] * probs[:, :1], 0.0)
    return ids.gather(1, _invert(probs, draws)[:, None])[:, 0]


def _invert(probs: Tensor, draws: Tensor) -> Tensor:
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    targets = draws[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # Rounding could point past the last token that has any weight.
    last = probs.shape[1] - 1 - (probs.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(picked, last)
