"""transformers' logits processors leave the same tokens, with the same probabilities, as our kernels."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ferrum_rt.kernels.logits import forbid_words, penalize_repetition
from ferrum_rt.kernels.sampling import argmax, top_candidates, truncate
from tests.kernels.naive_sampling import Cut, rows_of, truncation

SIZES = (50, 1_000, 32_000, 150_000)


def random_logits(rows: int, size: int, seed: int, scale: float) -> Tensor:
    """float32 [rows, size], no two of a row equal: of equal logits transformers keeps either."""
    generator = torch.Generator().manual_seed(seed)
    values = [(torch.randn(size + size // 10, generator=generator) * scale).unique() for _ in range(rows)]
    return torch.stack([row[torch.randperm(len(row), generator=generator)[:size]] for row in values])


def theirs(cut: Cut, penalty: float = 1.0) -> LogitsProcessorList:
    """What ``generate`` would build, in its order."""
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if cut.temperature != 1:
        processors.append(TemperatureLogitsWarper(cut.temperature))
    if cut.top_k:
        processors.append(TopKLogitsWarper(cut.top_k))
    if cut.top_p < 1:
        processors.append(TopPLogitsWarper(cut.top_p))
    if cut.min_p:
        processors.append(MinPLogitsWarper(cut.min_p))
    if cut.typical_p < 1:
        processors.append(TypicalLogitsWarper(cut.typical_p))
    return processors


def ours(logits: Tensor, history: Tensor, cut: Cut, penalty: float) -> Tensor:
    """Probabilities [R, V] by the kernels."""
    x = rows_of(logits)
    penalize_repetition(x, history, torch.full((len(x),), penalty))
    highest, _ = argmax(x)
    weights, ids = top_candidates(x, x.shape[1])
    weights.sub_(highest[:, None]).div_(torch.tensor(cut.temperature)).exp_()
    kept, _ = truncate(weights, truncation([cut] * len(x)), weights.double().sum(dim=1))
    probs = torch.zeros(x.shape, dtype=torch.float64).scatter_(1, ids, kept / kept.double().sum(dim=1, keepdim=True))
    return probs[:, : logits.shape[1]]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("cut", "penalty"),
    [
        (Cut(temperature=0.7), 1.0),
        (Cut(temperature=2.5), 1.0),
        (Cut(top_k=1), 1.0),
        (Cut(top_k=40), 1.0),
        (Cut(top_p=0.3), 1.0),
        (Cut(top_p=0.95), 1.0),
        (Cut(min_p=0.02), 1.0),
        (Cut(min_p=0.5), 1.0),
        (Cut(typical_p=0.2), 1.0),
        (Cut(typical_p=0.95), 1.0),
        (Cut(), 1.3),
        (Cut(), 0.8),
        (Cut(temperature=0.8, top_k=50, top_p=0.9), 1.1),
        (Cut(temperature=1.5, top_p=0.9, min_p=0.01, typical_p=0.9), 1.0),
        (Cut(temperature=1.2, top_k=200, top_p=0.95, min_p=0.02, typical_p=0.8), 1.2),
    ],
)
def test_transformers_leaves_the_same(size: int, cut: Cut, penalty: float) -> None:
    """Alone and chained, on flat and peaked logits, the same tokens are left with the same probabilities. Theirs are
    computed in float64: in float32 their typical_p cuts large vocabularies a few tokens off."""
    for scale in (1.0, 4.0):
        logits = random_logits(2, size, size + int(scale), scale)
        history = torch.randint(size, (2, 20), generator=torch.Generator().manual_seed(size))
        history[:, 10:] = torch.stack([row.topk(10).indices for row in logits])  # those that matter
        history[:, 0] = history[:, 1]
        expected = torch.softmax(theirs(cut, penalty)(cast(torch.LongTensor, history), logits.double()), dim=-1)
        found = ours(logits, history, cut, penalty)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_transformers_forbids_the_same_words(size: int) -> None:
    """Of 200 random words of one to four tokens the same ones are about to be completed, row by row."""
    rng = np.random.default_rng(size)
    few = 6
    history = rng.integers(0, few, (8, 12))
    words = [rng.integers(0, few, rng.integers(2, 5)).tolist() for _ in range(30)] + [[few + 1], [size - 1]]
    words += [[*history[0, -3:].tolist(), size - 2], [*history[1, -1:].tolist(), size - 3]]
    logits = random_logits(8, size, 3, 2.0)
    expected = NoBadWordsLogitsProcessor(words)(torch.from_numpy(history), logits)

    x = rows_of(logits)
    padded = torch.tensor([[-1] * (4 - len(word)) + word for word in words])
    rows = torch.arange(8).repeat_interleave(len(words))
    forbid_words(x, rows, padded.repeat(8, 1), torch.from_numpy(history[:, -3:])[rows], dummy=size)
    assert torch.equal(x[:, :size], expected)
    forbidden = (expected == -math.inf).sum(dim=1)
    assert (forbidden > 2).any()
    assert (forbidden < 4 + few).all()
