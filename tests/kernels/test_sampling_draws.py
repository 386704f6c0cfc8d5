"""Chance: the generator's numbers, how often tokens come, and Mirostat's feedback over many steps."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ferrum_rt.kernels.logits import penalize_presence, penalize_repetition
from ferrum_rt.kernels.sampling import argmax, draw, draw_truncated, streams, uniform, uniform_on_host
from tests.kernels.naive_sampling import Cut, distribution, penalized, rows_of, truncation

ODDS = 0.001
"""Chi-square tests fail where the statistic is rarer than this. Seeds are fixed: they always fail, or never."""


def rarity(observed: Tensor, expected: Tensor) -> float:
    """How likely counts at least this far from the expected ones are, by Pearson's chi-square."""
    assert expected.min() >= 5
    statistic = ((observed - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


# The generator

PINNED = [
    ((0, 0, 0), 0.13870941014555427),
    ((0, 0, 1), 0.18383979100743952),
    ((0, 1, 0), 0.9711020828012883),
    ((1, 0, 0), 0.6935121390102292),
    ((42, 7, 3), 0.11600093248992638),
    ((-1, 1, 0), 0.2859423389593416),
    ((9223372036854775807, 4096, 15), 0.1127155264619698),
    ((-9223372036854775808, 131071, 127), 0.9424531926439488),
]

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def finalized(z: int) -> int:
    """SplitMix64's finalizer, on Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def uniform_in_integers(seed: int, position: int, sample: int) -> float:
    z = finalized(seed + GOLDEN & MASK)
    z = finalized(z + (sample + 1) * GOLDEN & MASK)
    z = finalized(z + (position + 1) * GOLDEN & MASK)
    return (z >> 11) / 2**53


def uniform_of(seeds: object, positions: object, samples: object) -> Tensor:
    """``uniform`` of what numpy can broadcast."""
    columns = np.broadcast_arrays(*(np.asarray(x, dtype=np.int64) for x in (seeds, positions, samples)))
    return uniform(*(torch.from_numpy(column.copy()) for column in columns))


EDGES = (0, 1, 2, 1234, 2**31, 2**53 + 1, 2**63 - 1)


def test_the_generator_equals_its_definition_in_integers() -> None:
    """Bit for bit, for all triples of edge values, and for negative seeds."""
    triples = list(product((-1, -(2**63), *EDGES), EDGES[:-1], EDGES[:-1]))
    drawn, expected = uniform_of(*zip(*triples, strict=True)), [uniform_in_integers(*triple) for triple in triples]
    assert drawn.tolist() == expected
    seeds, positions, samples = np.array(triples, dtype=np.int64).T
    assert uniform_on_host(streams(seeds, samples), positions).tolist() == expected


@pytest.mark.parametrize(("triple", "value"), PINNED)
def test_the_generator_never_changes(triple: tuple[int, int, int], value: float) -> None:
    """A seed gives the same text in every version and on every device: these numbers stay."""
    assert uniform_of(*triple).item() == value
    assert uniform_in_integers(*triple) == value


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "samples"])
def test_draws_are_uniform_along_each_axis(axis: int) -> None:
    """Along seeds, positions and samples: mean, variance and histogram of a uniform variable, and no value twice."""
    count = 100_000
    draws = uniform_of(*(np.arange(count) if i == axis else 0 for i in range(3)))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 0.004
    assert abs(draws.var().item() - 1 / 12) < 0.001
    assert len(draws.unique()) == count
    assert rarity(torch.histc(draws, 1_000, 0, 1), torch.full((1_000,), count / 1_000)) > ODDS


STEPS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -1, 0), (0, 1, -1), (1, 0, -1), (1, 1, 1))


@pytest.mark.parametrize("step", STEPS)
def test_neighbours_are_independent(step: tuple[int, int, int]) -> None:
    """A draw says nothing about those of the next seed, position or sample, nor of neighbours across: all cells of the
    square that pairs of draws fall into are hit equally often, and they do not correlate."""
    count, cells = 200_000, 32
    rng = np.random.default_rng(17)
    here = [rng.integers(1, high, count) for high in (2**62, 4_096, 64)]
    first = uniform_of(*here)
    second = uniform_of(*(place + by for place, by in zip(here, step, strict=True)))
    cell = (first * cells).long() * cells + (second * cells).long()
    assert rarity(torch.bincount(cell, minlength=cells**2).double(), torch.full((cells**2,), count / cells**2)) > ODDS
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 3.3 / math.sqrt(count)


def test_triples_do_not_collide() -> None:
    """A grid of small seeds, positions and samples has as many draws as triples: no axis stands in for another."""
    grid = np.meshgrid(np.arange(-20, 40), np.arange(60), np.arange(60))
    assert len(uniform_of(*(axis.ravel() for axis in grid)).unique()) == 60**3


# Frequencies

LOGITS = torch.tensor([2.0, 1.7, 1.2, 1.1, 0.6, 0.4, 0.1, 0.0, -0.2, -0.5, -0.7, -0.9, -1.1, -1.4, -1.6, -1.9])
"""In no case below a token's fate hangs on rounding."""
HISTORY = [0, 0, 0, 2, 5, 5, 12]
ALL_CUTS = Cut(temperature=1.3, top_k=12, top_p=0.9, min_p=0.12, typical_p=0.8, max_surprise=4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "penalties"),
    [
        (Cut(), None),
        (Cut(temperature=0.6), None),
        (Cut(temperature=2.5), None),
        (Cut(top_k=5), None),
        (Cut(top_p=0.8), None),
        (Cut(min_p=0.15), None),
        (Cut(typical_p=0.7), None),
        (Cut(max_surprise=3.5), None),
        (Cut(), (1.3, 0.4, 0.2)),
        (ALL_CUTS, None),
        (ALL_CUTS, (1.3, 0.4, 0.2)),
    ],
)
def test_tokens_come_as_often_as_they_should(cut: Cut, penalties: tuple[float, float, float] | None) -> None:
    """Over 60,000 draws by seed, position and sample each token left comes as often as its probability says (chi-square),
    and no other ever; the same with and without candidates, where nothing is cut."""
    count = 60_000
    shuffled = LOGITS[torch.randperm(len(LOGITS), generator=torch.Generator().manual_seed(5))]
    x, row = rows_of(shuffled.expand(count, -1)), shuffled.double().numpy()
    if penalties is not None:
        ids, (repetition, presence, frequency) = torch.tensor(HISTORY).expand(count, -1), torch.tensor(penalties)
        penalize_repetition(x, ids, repetition.expand(count))
        penalize_presence(x, ids, presence.expand(count), frequency.expand(count))
        row = penalized(row, HISTORY, *penalties)
    expected = torch.from_numpy(distribution(row, cut)) * count
    draws = uniform_of(np.arange(count) % 7, np.arange(count) // 7 % 2_500, np.arange(count) // 17_500)
    cuts, highest = truncation([cut] * count), argmax(x)[0]
    tokens = [draw_truncated(x, highest, cuts, draws, count=max(cut.top_k, 8))[0]]
    if cut == Cut(temperature=cut.temperature):
        tokens.append(draw(x, highest, cuts.temperature, draws))
    for drawn in tokens:
        observed = torch.bincount(drawn, minlength=len(LOGITS)).double()
        assert not observed[expected == 0].any()
        assert rarity(observed[expected > 0], expected[expected > 0]) > ODDS


# Mirostat


@pytest.mark.slow
def test_mirostat_holds_the_mean_surprise() -> None:
    """Adjusting max_surprise by what each token surprised keeps the mean within 0.3 bits of what is asked for, whatever the
    logits are like, if only they are uncertain enough (arXiv:2007.14966, its second version)."""
    # Entropies: 9.9 bits at scale 0.2, 9.2 at 1, on average 3.6 at 4.
    scales = torch.tensor([0.2, 0.2, 1.0, 1.0, 1.0, 4.0, 4.0])
    wanted = torch.tensor([3.0, 8.0, 2.0, 5.0, 8.0, 1.0, 2.5], dtype=torch.float64)
    size, steps, rows, rate = 1_000, 500, len(scales), 0.1
    generator = torch.Generator().manual_seed(21)
    bound, total = 2 * wanted, torch.zeros(rows, dtype=torch.float64)
    cut = truncation([Cut()] * rows)
    for position in range(steps):
        logits = torch.randn(rows, size, generator=generator) * scales[:, None]
        draws = uniform_of(np.arange(rows), position, 0)
        _, surprise = draw_truncated(
            rows_of(logits), argmax(logits)[0], cut._replace(max_surprise=bound.float()), draws, count=256
        )
        bound = bound - rate * (surprise - wanted)
        total += surprise
    assert (total / steps - wanted).abs().max() < 0.3
