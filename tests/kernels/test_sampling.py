"""Kernels that draw tokens: equal to the plain way of doing it, and a row's draw depends on nothing but the row."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.sampling import (
    argmax,
    draw,
    draw_truncated,
    log_sum_exp,
    top_candidates,
    truncate,
    workspace,
)
from tests.kernels.naive_sampling import (
    Bools,
    Cut,
    Floats,
    best_first,
    left_by_thresholds,
    left_by_typical,
    probabilities,
    rows_of,
    truncation,
)

SMALL = st.integers(1, 700)
BIG = st.sampled_from([1_000, 32_000, 50_257, 128_256, 150_000]) | st.integers(701, 150_000)
LAST = 1 - 2.0**-53


def random_logits(rows: int, size: int, seed: int, *, scale: float = 3.0, ties: bool = False, barred: float = 0.0) -> Tensor:
    """float32 [rows, size]; ``ties`` rounds them to bfloat16, ``barred`` is the share of -inf."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((rows, size), dtype=np.float32) * np.float32(scale))
    if ties:
        logits = logits.bfloat16().float()
    first = logits[:, :1].clone()
    logits[torch.from_numpy(rng.random((rows, size)) < barred)] = -math.inf
    logits[logits.amax(dim=1) == -math.inf, :1] = first[logits.amax(dim=1) == -math.inf]
    return logits


def logit_rows(sizes: st.SearchStrategy[int], rows: int = 1) -> st.SearchStrategy[Tensor]:
    return st.builds(
        random_logits,
        st.just(rows),
        sizes,
        st.integers(0, 2**32 - 1),
        scale=st.sampled_from([0.0, 1e-3, 0.5, 3.0, 10.0, 1e3]),
        ties=st.booleans(),
        barred=st.sampled_from([0.0, 0.0, 0.5, 0.999]),
    )


CUTS = st.builds(
    Cut,
    temperature=st.sampled_from([1.0, 1e-6, 0.01, 100.0]) | st.floats(0.0625, 5.0, width=32),
    top_k=st.sampled_from([0, 0, 0, 1, 3, 50, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.5, 0.999]) | st.floats(0.015625, 1.0, width=32),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.05, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 1.0, 0.2, 0.9]),
    max_surprise=st.sampled_from([math.inf, math.inf, 0.0, 3.0, 8.0, 16.0]),
)


def as_numpy(logits: Tensor) -> Floats:
    row: Floats = logits.double().numpy()
    return row


def truncated(logits: Tensor, cut: Cut, count: int) -> tuple[Floats, bool]:
    """(weights [V], whether no others are left) that ``truncate`` leaves of the ``count`` likeliest tokens of a row [V]."""
    x = rows_of(logits[None])
    highest, _ = argmax(logits[None])
    total = ((logits.double() - highest) / float(np.float32(cut.temperature))).exp().sum(dim=-1, keepdim=True)
    weights, ids = top_candidates(x, count)
    weights.sub_(highest[:, None]).div_(torch.tensor(cut.temperature)).exp_()
    kept, num_left = truncate(weights, truncation([cut]), total)
    assert (kept[:, 1:] <= kept[:, :-1]).all() or cut.typical_p < 1
    whole_row = torch.zeros_like(x).scatter_(1, ids, kept)
    assert not whole_row[:, len(logits) :].any()
    return as_numpy(whole_row[0, : len(logits)]), int(num_left) < kept.shape[1] or cut.top_k > 0


def check_truncation(logits: Tensor, cut: Cut, count: int) -> Bools:
    """The tokens left are the naive reference's, with its probabilities; says which they are."""
    row, width = as_numpy(logits), workspace(1, len(logits), "cpu").shape[1]
    must, may = left_by_thresholds(row, cut)
    weights, is_whole = truncated(logits, cut._replace(typical_p=1.0), width)
    assert is_whole
    left = weights > 0
    assert (left[must]).all()
    assert (may[left]).all()

    weights, _ = truncated(logits, cut, width)
    must, may = left_by_typical(row, cut.temperature, left, cut.typical_p)
    left = weights > 0
    assert (left[must]).all()
    assert (may[left]).all()
    expected = probabilities(row, cut.temperature, left)
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=1e-5, atol=1e-12)

    of_some, is_whole = truncated(logits, cut, max(count, cut.top_k))
    if is_whole:
        np.testing.assert_array_equal(of_some, weights)
    return left


def check_drawn(token: int, value: float, probs: Floats) -> None:
    """The token is where ``value`` falls in the cumulative distribution of ``probs``, to within 1e-6."""
    reached = np.cumsum(probs)
    assert probs[token] > 0
    assert reached[token] - probs[token] - 1e-6 <= value <= reached[token] + 1e-6


def check_draws(logits: Tensor, cut: Cut, count: int, left: Bools) -> None:
    """Draws all over [0, 1) hit the tokens that the inverse of the cumulative distribution, best first, points to."""
    values = [0.0, 1e-12, 0.2, 0.5, 0.77, 0.99, 0.99999, LAST]
    rows = logits.expand(len(values), -1)
    cuts, draws = truncation([cut] * len(values)), torch.tensor(values, dtype=torch.float64)
    tokens, surprise = draw_truncated(rows_of(rows), argmax(rows)[0], cuts, draws, count=max(count, cut.top_k))
    row = as_numpy(logits)
    probs, order = probabilities(row, cut.temperature, left), best_first(row)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    for token, value, bits in zip(tokens.tolist(), values, surprise.tolist(), strict=True):
        check_drawn(place[token], value, probs[order])
        assert bits == pytest.approx(-math.log2(probs[token]), rel=1e-5, abs=1e-6)


# What is left, and with which probability


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(logits=logit_rows(SMALL), cut=CUTS, count=st.integers(1, 800))
def test_small_vocabularies_are_cut_as_the_reference_cuts(logits: Tensor, cut: Cut, count: int) -> None:
    """Any combination of cuts leaves the reference's tokens and probabilities, and draws are the inverse CDF of that."""
    left = check_truncation(logits[0], cut, count)
    check_draws(logits[0], cut, count, left)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(logits=logit_rows(BIG), cut=CUTS, count=st.sampled_from([1, 256, 1000]))
def test_big_vocabularies_are_cut_as_the_reference_cuts(logits: Tensor, cut: Cut, count: int) -> None:
    """The same for vocabularies up to 150,000 tokens."""
    left = check_truncation(logits[0], cut, count)
    check_draws(logits[0], cut, count, left)


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        (Cut(top_k=3), {0, 1, 2}),
        (Cut(top_p=0.79), {0, 1, 2}),
        (Cut(top_p=0.81), {0, 1, 2, 3}),
        (Cut(top_k=2, top_p=0.6), {0}),  # 0.4 of the 0.65 left by top_k is 0.615
        (Cut(top_k=2, top_p=0.62), {0, 1}),
        (Cut(min_p=0.36), {0, 1, 2}),
        (Cut(max_surprise=2.1), {0, 1}),  # 0.25 is 2 bits, 0.15 2.7
        (Cut(typical_p=0.3), {1, 2}),  # the entropy is 1.47 nats: nearest are 0.25 (1.39), then 0.15 (1.90)
        (Cut(temperature=0.5, min_p=0.36), {0, 1}),
    ],
)
def test_cuts_of_a_distribution_done_by_hand(cut: Cut, left: set[int]) -> None:
    """Probabilities 0.4, 0.25, 0.15, 0.1, 0.06, 0.04 are cut where arithmetic on paper cuts them."""
    logits = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).log()
    weights, _ = truncated(logits, cut, 6)
    assert set(weights.nonzero()[0].tolist()) == left


# Reductions and candidates


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(logits=logit_rows(SMALL | BIG, rows=3), seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.01, 0.5]))
def test_argmax_is_the_first_largest_entry(logits: Tensor, seed: int, share: float) -> None:
    """The first of equal entries, the first NaN where there is one, 0 in a row of -inf; in float32 and bfloat16."""
    logits[torch.from_numpy(np.random.default_rng(seed).random(logits.shape) < share)] = math.nan
    logits[2] = -math.inf
    for row in (logits, logits.bfloat16()):
        values, ids = argmax(row)
        assert ids.tolist() == row.float().numpy().argmax(axis=1).tolist()
        torch.testing.assert_close(values, row.gather(1, ids[:, None])[:, 0], rtol=0, atol=0, equal_nan=True)


def check_candidates(logits: Tensor, count: int) -> None:
    values, ids = top_candidates(rows_of(logits), count)
    for row, found, tokens in zip(logits, values, ids, strict=True):
        padded = torch.cat([row, torch.full((workspace(1, len(row), "cpu").shape[1] - len(row),), -math.inf)])
        order = best_first(as_numpy(padded))[:count]
        assert tokens.tolist() == order.tolist()
        assert torch.equal(found, padded[torch.from_numpy(order)])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 127, 128, 300, 1_100])
def test_every_count_of_candidates_prefers_the_lowest_ids(size: int) -> None:
    """Rows full of exact ties give, for every count, the ids of a stable sort; also past the end of the vocabulary."""
    logits = torch.cat([random_logits(2, size, 5, scale=0.05, ties=True), random_logits(1, size, 6, scale=0.0)])
    width = workspace(1, size, "cpu").shape[1]
    for count in range(1, width + 3):
        check_candidates(logits, count)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(logits=logit_rows(BIG, rows=2), count=st.integers(1, 400) | st.sampled_from([4_096, 65_536, 200_000]))
def test_candidates_of_big_vocabularies(logits: Tensor, count: int) -> None:
    """The same for vocabularies up to 150,000 tokens."""
    check_candidates(logits, count)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(logits=logit_rows(SMALL | BIG, rows=2))
def test_log_sum_exp_is_that_of_float64(logits: Tensor) -> None:
    """It agrees with float64 to a part in a million."""
    highest, _ = argmax(logits)
    expected = logits.double().logsumexp(dim=1)
    torch.testing.assert_close(log_sum_exp(rows_of(logits), highest).double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(logits=logit_rows(SMALL | BIG), temperature=st.sampled_from([1e-6, 0.3, 1.0, 100.0]))
def test_plain_draws_invert_the_cumulative_distribution(logits: Tensor, temperature: float) -> None:
    """Without cuts, each draw hits the token, in order of ids, at which the cumulative probability passes it."""
    values = [0.0, LAST, *np.random.default_rng(logits.shape[1]).random(30).tolist()]
    rows = logits.expand(len(values), -1)
    tokens = draw(
        rows_of(rows),
        argmax(rows)[0],
        torch.full((len(values),), temperature),
        torch.tensor(values, dtype=torch.float64),
    )
    row = as_numpy(logits[0])
    probs = probabilities(row, temperature, np.ones(len(row), dtype=bool))
    for token, value in zip(tokens.tolist(), values, strict=True):
        check_drawn(token, value, probs)


# A row's draw depends on nothing but the row


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draws_of(logits: Tensor, cuts: list[Cut], values: Tensor, count: int) -> list[tuple[int, float, int, float]]:
    """(token, surprise, token drawn from the whole vocabulary, log of the sum of exponentials) of each row."""
    highest, cut = argmax(logits)[0], truncation(cuts)
    tokens, surprise = draw_truncated(rows_of(logits), highest, cut, values, count=count)
    plain = draw(rows_of(logits), highest, cut.temperature, values)
    total = log_sum_exp(rows_of(logits), highest)
    return list(zip(tokens.tolist(), surprise.tolist(), plain.tolist(), total.tolist(), strict=True))


def check_that_rows_are_alone(logits: Tensor, cuts: list[Cut], seed: int, alone: list[int]) -> None:
    """Bit for bit the same, in a batch in another order, and alone, with other counts and numbers of threads."""
    values = torch.from_numpy(np.random.default_rng(seed).random(len(logits)))
    values[:2] = torch.tensor([0.0, LAST])
    bound = max(1, *(cut.top_k for cut in cuts))
    with threads(1):
        together = draws_of(logits, cuts, values, bound)
    order = np.random.default_rng(seed).permutation(len(logits)).tolist()
    with threads(2):
        moved = draws_of(logits[order], [cuts[row] for row in order], values[order], max(bound, 256))
        assert moved == [together[row] for row in order]
    for row in alone:
        for count, num_threads in ((1, 1), (7, 2), (256, 1)):
            with threads(num_threads):
                one = slice(row, row + 1)
                drawn = draws_of(logits[one], cuts[one], values[one], max(count, cuts[row].top_k))
            assert drawn == [together[row]]


def various_rows(size: int, seed: int) -> Tensor:
    """32 rows of all kinds: peaked, flat, full of ties, and so narrow that different logits have equal weights."""
    kinds = (
        (3.0, False),
        (3.0, True),
        (0.5, False),
        (1e-3, False),
        (10.0, False),
        (1e-6, False),
        (30.0, True),
        (0.0, False),
    )
    rows = [random_logits(4, size, seed + i, scale=scale, ties=ties) for i, (scale, ties) in enumerate(kinds)]
    return torch.cat(rows)[torch.from_numpy(np.random.default_rng(seed).permutation(32))]


def various_cuts(seed: int) -> list[Cut]:
    """32 combinations, drawn by one seed (a list of strategies would take minutes to shrink)."""
    rng = random.Random(seed)
    return [
        Cut(
            temperature=rng.choice([1.0, 100.0, rng.uniform(0.1, 3.0)]),
            top_k=rng.choice([0, 0, 3, 50, 1000]),
            top_p=rng.choice([1.0, rng.random()]),
            min_p=rng.choice([0.0, 0.0, rng.random() ** 4]),
            typical_p=rng.choice([1.0, 1.0, rng.random()]),
            max_surprise=rng.choice([math.inf, rng.uniform(0.0, 10.0)]),
        )
        for _ in range(32)
    ]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(size=SMALL, seed=st.integers(0, 2**31))
def test_small_rows_draw_the_same_in_any_company(size: int, seed: int) -> None:
    """A row alone, in a batch of 32 with other parameters, elsewhere in it, with other counts and threads draws the same."""
    check_that_rows_are_alone(various_rows(size, seed), various_cuts(seed), seed, alone=[0, 5, 17, 31])


@pytest.mark.slow
@pytest.mark.parametrize("size", [33_000, 150_000])
def test_big_rows_draw_the_same_in_any_company(size: int) -> None:
    """The same where torch splits the work among threads."""
    cuts = [
        Cut(),
        Cut(temperature=0.7, top_p=0.9),
        Cut(top_k=50, typical_p=0.9),
        Cut(min_p=0.05),
        Cut(temperature=3.0, max_surprise=8.0),
        Cut(top_k=1000, top_p=0.5),
        Cut(temperature=100.0, top_p=0.01),
        Cut(min_p=0.001, typical_p=0.5),
    ] * 4
    check_that_rows_are_alone(various_rows(size, 11), cuts, 11, alone=[1, 4, 7, 14, 22, 24])


@pytest.mark.slow
def test_sums_are_added_in_the_same_order_in_any_company() -> None:
    """Where the logarithm hides no bit of the sum (it is near 1), a row alone on two threads gets the bits of a batch's."""
    logits = random_logits(16, 150_000, 2) - 20
    logits[:, 777] = 0.0
    with threads(1):
        together = log_sum_exp(rows_of(logits), torch.zeros(16))
    with threads(2):
        alone = [log_sum_exp(rows_of(row[None]), torch.zeros(1)) for row in logits]
    assert torch.equal(torch.cat(alone), together)


def test_a_surprise_at_the_bound_has_the_same_fate_in_any_company() -> None:
    """Weights within an ulp or two of max_surprise's threshold are cut alike in a batch and alone."""
    bounds = torch.rand(64, generator=torch.Generator().manual_seed(3)) * 12
    nearest = torch.pow(2.0, -bounds.double()).float()[:, None]
    weights = torch.cat([torch.ones(64, 1), nearest * (1 + torch.arange(3, -4, -1) * 2.0**-23)], dim=1)
    cuts = truncation([Cut(max_surprise=bound) for bound in bounds.tolist()])
    together, _ = truncate(weights, cuts, torch.ones(64))
    for row in range(64):
        one = torch.tensor([row])
        assert torch.equal(truncate(weights[one], cuts.rows(one), torch.ones(1))[0], together[one])


def test_typical_p_at_the_mass_reached_leaves_the_same_for_any_count() -> None:
    """Where typical_p is, but for rounding, what some tokens add up to, zeros behind them do not tip the balance."""
    logits = random_logits(1, 20, 9).sort(descending=True).values.expand(40, -1)
    weights = (logits - logits[:, :1]).exp()
    probs = (weights.double() / weights.double().sum(dim=1, keepdim=True))[0]
    surprise = -probs.log()
    reached = probs[(surprise - (probs * surprise).sum()).abs().argsort()].cumsum(dim=0).float()
    levels = torch.cat([reached, reached.nextafter(torch.tensor(0.0))]).tolist()
    cuts = truncation([Cut(top_k=20, typical_p=level) for level in levels])
    few, _ = truncate(weights, cuts, None)
    for zeros in (1, 12, 108, 300):
        many, _ = truncate(torch.cat([weights, torch.zeros(40, zeros)], dim=1), cuts, None)
        assert torch.equal(many[:, :20], few)


@pytest.mark.parametrize("cut", [Cut(), Cut(top_k=5), Cut(top_p=0.9), Cut(min_p=0.1, typical_p=0.5), Cut(max_surprise=3.0)])
@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_rows_that_are_not_numbers_spoil_no_other(cut: Cut, broken: float) -> None:
    """Rows without a finite maximum get some entry of the workspace, in finite time, and the others what they get alone."""
    logits = random_logits(4, 300, 8)
    logits[1], logits[2, 7:] = -math.inf, broken
    values = torch.tensor([0.1, 0.5, LAST, 0.9], dtype=torch.float64)
    together = draws_of(logits, [cut] * 4, values, 8)
    for row in (0, 3):
        one = slice(row, row + 1)
        assert draws_of(logits[one], [cut], values[one], 8) == [together[row]]
    width = workspace(1, 300, "cpu").shape[1]
    assert all(0 <= token < width and 0 <= plain < width for token, _, plain, _ in together)


# Extremes


def tokens_drawn(logits: Tensor, cut: Cut) -> set[int]:
    """What draws at both ends of the unit interval and in between hit, from what ``cut`` leaves and, if it cuts nothing but
    the temperature is another, from the whole."""
    values = torch.tensor([0.0, 2.0**-53, 0.3, 0.7, LAST], dtype=torch.float64)
    rows, cuts = logits.expand(len(values), -1), [cut] * len(values)
    drawn = {token for token, *_ in draws_of(rows, cuts, values, max(4, cut.top_k))}
    if cut == Cut(temperature=cut.temperature):
        drawn |= {plain for _, _, plain, _ in draws_of(rows, cuts, values, 4)}
    return drawn


@pytest.mark.parametrize("place", [1, 100, 128, 999])
def test_tokens_rarer_than_float32_resolves_are_drawn(place: int) -> None:
    """A token of probability 2.1e-9, at the end of the distribution, comes when the draw is within that of 1. (Without
    candidates, only across blocks of 128: inside, what all tokens of a block weigh is a sum in float32.)"""
    logits = torch.full((2, 1_000), -math.inf)
    logits[:, 0], logits[:, place] = 0.0, -20.0
    values = torch.tensor([1 - 1e-9, 1 - 3e-9], dtype=torch.float64)
    drawn = draws_of(logits, [Cut()] * 2, values, 4)
    assert [token for token, *_ in drawn] == [place, 0]
    assert [plain for _, _, plain, _ in drawn] == [place if place >= 128 else 0, 0]


@pytest.mark.parametrize("size", [1, 2, 128, 30_000])
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 100.0])
def test_one_finite_logit_is_always_drawn(size: int, value: float, temperature: float) -> None:
    """Among -inf the one finite logit is hit by every draw, wherever it stands, and its surprise is 0."""
    for place in {0, size // 2, size - 1}:
        logits = torch.full((size,), -math.inf)
        logits[place] = value
        for cut in (Cut(), Cut(top_p=1e-9), Cut(min_p=1.0), Cut(typical_p=1e-6), Cut(top_k=2, max_surprise=0.0)):
            assert tokens_drawn(logits, cut._replace(temperature=temperature)) == {place}


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        (Cut(temperature=1e-6), {3}),
        (Cut(temperature=100.0), {1, 2, 3}),  # 1e4 apart is e^-100, and a draw of 0.0 hits the first token of any weight
        (Cut(top_p=1e-9), {3}),
        (Cut(top_p=0.0), {3}),
        (Cut(min_p=1.0), {3}),
        (Cut(max_surprise=0.0), {3}),
        (Cut(max_surprise=-5.0), {3}),
        (Cut(top_k=1), {3}),
        (Cut(top_k=4, temperature=100.0), {2, 3}),
    ],
)
def test_far_ends_of_parameters_and_logits(cut: Cut, left: set[int]) -> None:
    """With logits of +-1e4, every draw hits what the tightest and the loosest parameters leave, and nothing of no weight."""
    logits = torch.tensor([-1e4, 0.0, 9.99e3, 1e4, -math.inf])
    assert tokens_drawn(logits, cut) == left


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 128, 129, 3_000, 150_000])
def test_rows_of_equal_logits(size: int) -> None:
    """All tokens are equally likely; cuts by mass take the lowest ids, and cuts by weight, which tie, take none."""
    logits = torch.full((size,), 7.25)
    for cut in (
        Cut(),
        Cut(min_p=1.0),
        Cut(typical_p=0.01),
        Cut(temperature=100.0),
        Cut(max_surprise=math.log2(size) + 1e-3),
    ):
        check_draws(logits, cut, 16, np.ones(size, dtype=bool))
    for cut, num_left in ((Cut(top_k=3), 3), (Cut(top_p=0.5), (size + 1) // 2), (Cut(top_p=1e-9), 1)):
        check_draws(logits, cut, 16, np.arange(size) < num_left)


@pytest.mark.parametrize("size", [1, 127, 128, 150_000])
def test_a_workspace_has_room_for_what_is_no_token(size: int) -> None:
    """Rows are whole blocks with a column beyond the vocabulary, all -inf, which no draw hits."""
    x = workspace(2, size, "cpu")
    assert x.shape[1] > size
    assert x.shape[1] % 128 == 0
    assert (x == -math.inf).all()
    x[:, size - 1] = -100.0
    assert draw(x, torch.full((2,), -100.0), torch.ones(2), torch.tensor([0.0, LAST]).double()).tolist() == [size - 1] * 2
