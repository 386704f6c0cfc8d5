"""Sampling done the plain way, in float64 and one row at a time: what the kernels are compared with.

Where a token's fate hangs on rounding there are two answers, so what is left is given as two sets: the tokens that must be
left, and those that may be.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferrum_rt.kernels.sampling import Truncation, workspace

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SLACK = 1e-5
"""How near to a threshold, relative to it, either fate is right."""


class Cut(NamedTuple):
    """One row of ``Truncation``, as numbers."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    max_surprise: float = math.inf


def truncation(cuts: Sequence[Cut]) -> Truncation:
    columns = zip(*cuts, strict=True)
    return Truncation(*(torch.tensor(c, dtype=torch.int64 if i == 1 else torch.float32) for i, c in enumerate(columns)))


def rows_of(logits: Tensor) -> Tensor:
    """A workspace that holds these logits [R, V]."""
    x = workspace(len(logits), logits.shape[1], "cpu")
    x[:, : logits.shape[1]] = logits
    return x


def best_first(logits: Floats) -> NDArray[np.int64]:
    """Token ids by falling logit, of equal ones the lowest first."""
    return np.argsort(-logits, kind="stable").astype(np.int64)


def weights_of(logits: Floats, temperature: float) -> Floats:
    """exp(logit / temperature), scaled so that the largest is 1."""
    weights: Floats = np.exp((logits - logits.max()) / float(np.float32(temperature)))
    return weights


def left_by_thresholds(logits: Floats, cut: Cut) -> tuple[Bools, Bools]:
    """(must, may) [V] be left by everything but typical_p."""
    weights, order = weights_of(logits, cut.temperature), best_first(logits)
    if cut.top_k:
        weights[order[cut.top_k :]] = 0.0
    total = weights.sum()
    before = np.empty_like(weights)
    before[order] = np.cumsum(weights[order]) - weights[order]
    enough = float(np.float32(cut.top_p)) * total if cut.top_p < 1 else math.inf
    least = max(float(np.float32(cut.min_p)), total * 2.0 ** -float(np.float32(cut.max_surprise)))
    # float32 has no weights below 1.4e-45, and is coarse below 1.2e-38.
    must = (before < enough * (1 - SLACK)) & (weights >= least * (1 + SLACK)) & (weights > 1.2e-38)
    may = (before < enough * (1 + SLACK)) & (weights >= least * (1 - SLACK)) & (weights > 5e-46)
    must[order[0]] = may[order[0]] = True
    return must, may


def left_by_typical(logits: Floats, temperature: float, left: Bools, typical_p: float) -> tuple[Bools, Bools]:
    """(must, may) [V] be left by typical_p of the tokens that the thresholds left."""
    if typical_p >= 1:
        return left, left
    probs = probabilities(logits, temperature, left)[left]
    surprise = -np.log(probs)
    distance = np.abs(surprise - (probs * surprise).sum())
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(probs[order])
    lowest, highest = (
        distance[order][min(int((reached < typical_p * factor).sum()), len(order) - 1)] for factor in (1 - SLACK, 1 + SLACK)
    )
    slack = SLACK * (1 + surprise)
    must, may = left.copy(), left.copy()
    must[left] = distance < lowest - slack
    may[left] = distance <= highest + slack
    return must, may


def probabilities(logits: Floats, temperature: float, left: Bools) -> Floats:
    """[V], of the tokens that are left."""
    weights = weights_of(np.where(left, logits, -math.inf), temperature)
    probs: Floats = weights / weights.sum()
    return probs


def distribution(logits: Floats, cut: Cut) -> Floats:
    """What is drawn from, where no token's fate hangs on rounding."""
    must, may = left_by_thresholds(logits, cut)
    assert (must == may).all()
    must, may = left_by_typical(logits, cut.temperature, must, cut.typical_p)
    # The token at which typical_p is reached is the threshold itself.
    return probabilities(logits, cut.temperature, may)


def penalized(logits: Floats, token_ids: Sequence[int], repetition: float, presence: float, frequency: float) -> Floats:
    """The logits after a repetition penalty, then presence and frequency penalties, for the tokens that occurred."""
    logits = logits.copy()
    for token in set(token_ids):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        logits[token] -= presence + frequency * list(token_ids).count(token)
    return logits
