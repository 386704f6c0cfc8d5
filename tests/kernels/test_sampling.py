"""Drawing tokens: the right candidates, the right frequencies, and nothing but the seed and the position matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.sampling import sample_all, sample_top, uniform


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The candidates left by top_k, then top_p, then min_p, in plain Python."""
    scaled = torch.tensor(logits, dtype=torch.float64) / temperature
    probs = torch.softmax(scaled, dim=-1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    if top_k:
        order = order[:top_k]
    total, before, kept = sum(probs[token] for token in order), 0.0, []
    for token in order:
        if before < top_p * total:
            kept.append(token)
        before += probs[token]
    return {token for token in kept if probs[token] >= min_p * probs[order[0]]}


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, draws: Tensor) -> list[int]:
    rows = len(draws)
    tokens: list[int] = sample_top(
        logits.expand(rows, -1),
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        draws,
    ).tolist()
    return tokens


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=30, unique=True),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.1, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_candidates_equal_the_naive_ones(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Draws all over [0, 1) hit every candidate the naive filter leaves, and no other."""
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    draws = torch.linspace(0.0, 1.0 - 1e-12, 20_000, dtype=torch.float64)
    found = set(draw(torch.tensor(logits), temperature, top_k, top_p, min_p, draws))
    assert found <= expected
    probs = torch.softmax(torch.tensor(logits).double() / temperature, dim=-1)
    assert {token for token in expected if probs[token] > 2e-4} <= found


def test_frequencies_follow_the_distribution() -> None:
    """Over many positions of one seed each token comes as often as its probability says (chi-square, p > 0.001)."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    count = 50_000
    draws = uniform(torch.full((count,), 1234), torch.arange(count))
    tokens = sample_all(logits.expand(count, -1), torch.ones(count), torch.zeros(count), draws)
    observed = torch.bincount(tokens, minlength=5).double()
    expected = torch.softmax(logits.double(), dim=-1) * count
    assert ((observed - expected).square() / expected).sum() < 18.47  # 4 degrees of freedom


def test_draws_are_uniform_over_seeds_and_over_positions() -> None:
    """The generator has the mean and the variance of a uniform variable along either axis, and no value twice."""
    for seeds, positions in (
        (torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64)),
        (torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000)),
    ):
        draws = uniform(seeds, positions)
        assert draws.min() >= 0
        assert draws.max() < 1
        assert abs(draws.mean().item() - 0.5) < 0.004
        assert abs(draws.var().item() - 1 / 12) < 0.001
        assert len(draws.unique()) == len(draws)


@pytest.mark.parametrize("value", [0.0, 1.0 - 2.0**-53])
def test_extreme_draws_hit_tokens_that_have_weight(value: float) -> None:
    """The ends of the unit interval never pick a token of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    token = sample_all(logits, torch.ones(1), torch.zeros(1), torch.tensor([value], dtype=torch.float64))
    assert token.item() in (1, 2)
