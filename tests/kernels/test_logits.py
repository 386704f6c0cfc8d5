"""Kernels that change logits in place: penalties, biases, forbidden tokens and masks, against the plain way of doing it."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.logits import (
    ALL_BITS,
    add_bias,
    allow_only,
    bit_table,
    forbid,
    forbid_words,
    mask_of,
    penalize_presence,
    penalize_repetition,
)
from tests.kernels.naive_sampling import penalized, rows_of

SIZES = st.integers(1, 400) | st.sampled_from([127, 128, 129, 32_000, 150_000])
SEEDS = st.integers(0, 2**32 - 1)


def random_rows(rows: int, size: int, seed: int) -> Tensor:
    """float32 [rows, size] of both signs, with some zeros and some -inf."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.standard_normal((rows, size), dtype=np.float32) * 5)
    logits[torch.from_numpy(rng.random((rows, size)) < 0.1)] = 0.0
    logits[torch.from_numpy(rng.random((rows, size)) < 0.1)] = -math.inf
    return logits


def check(x: Tensor, expected: Tensor) -> None:
    """The workspace holds the expected logits [R, V] (to the bit, if they are float32), and -inf in all other columns."""
    tokens, others = x[:, : expected.shape[1]], x[:, expected.shape[1] :]
    slack = 0.0 if expected.dtype == torch.float32 else 1e-5
    torch.testing.assert_close(tokens.to(expected.dtype), expected, rtol=slack, atol=slack)
    assert (others == -math.inf).all()


# Penalties and biases


@settings(max_examples=120, deadline=None)
@given(
    size=SIZES,
    seed=SEEDS,
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    repetition=st.sampled_from([1.0, 1.3, 0.5, 2.0]),
    presence=st.sampled_from([0.0, 0.7, -2.0]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
)
@pytest.mark.slow
def test_penalties_equal_the_reference(
    size: int, seed: int, lengths: list[int], repetition: float, presence: float, frequency: float
) -> None:
    """Rows of histories of different lengths, with repeated ids and filled up with the dummy column, are penalized as the
    reference does it token by token; nothing else changes."""
    rng = random.Random(seed)
    logits = random_rows(len(lengths), size, seed)
    histories = [[rng.randrange(min(size, 9)) if rng.random() < 0.8 else size - 1 for _ in range(n)] for n in lengths]
    filled = torch.tensor([history + [size] * (max(lengths) - len(history)) for history in histories], dtype=torch.int64)
    strengths = [[strength] * len(lengths) for strength in (repetition, presence, frequency)]
    for strength in strengths:
        strength[0] *= 0.5  # rows differ
    of_repetition, of_presence, of_frequency = (torch.tensor(strength) for strength in strengths)

    x = rows_of(logits)
    penalize_repetition(x, filled, of_repetition)
    penalize_presence(x, filled, of_presence, of_frequency)
    expected = [
        penalized(row.double().numpy(), history, *numbers)
        for row, history, *numbers in zip(logits, histories, *strengths, strict=True)
    ]
    check(x, torch.from_numpy(np.stack(expected)))


def test_penalties_by_hand() -> None:
    """A repetition penalty halves what is above 0 and doubles what is below, once; presence counts once, frequency twice."""
    logits = torch.tensor([[4.0, -4.0, 0.0, 1.0], [4.0, -4.0, 0.0, 1.0]])
    ids = torch.tensor([[0, 1, 0, 2], [3, 4, 4, 4]])
    x = rows_of(logits)
    penalize_repetition(x, ids, torch.tensor([2.0, 4.0]))
    check(x, torch.tensor([[2.0, -8.0, 0.0, 1.0], [4.0, -4.0, 0.0, 0.25]]))
    x = rows_of(logits)
    penalize_presence(x, ids, torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.125]))
    check(x, torch.tensor([[2.5, -5.25, -1.25, 1.0], [4.0, -4.0, 0.0, 0.375]]))


@settings(max_examples=100, deadline=None)
@given(size=SIZES, seed=SEEDS, count=st.integers(0, 60))
@pytest.mark.slow
def test_biases_and_forbidden_tokens_touch_their_pairs_alone(size: int, seed: int, count: int) -> None:
    """Each (row, token) pair gets its bias, or cannot be drawn; all other logits keep their bits."""
    rng = random.Random(seed)
    pairs = list({(rng.randrange(3), rng.randrange(size)) for _ in range(count)})
    rows, tokens = torch.tensor([row for row, _ in pairs]).long(), torch.tensor([token for _, token in pairs]).long()
    bias = torch.tensor([rng.choice([-100.0, 0.5, 100.0, -math.inf]) for _ in pairs])
    logits = random_rows(3, size, seed)

    x, expected = rows_of(logits), logits.clone()
    add_bias(x, rows, tokens, bias)
    for (row, token), value in zip(pairs, bias, strict=True):
        expected[row, token] = expected[row, token] + value
    check(x, expected)

    x, expected = rows_of(logits), logits.clone()
    forbid(x, torch.cat([rows, rows]), torch.cat([tokens, tokens]))  # a pair may be forbidden twice
    for row, token in pairs:
        expected[row, token] = -math.inf
    check(x, expected)


# Words


def forbid_in(logits: Tensor, histories: list[list[int]], words: list[tuple[int, list[int]]]) -> Tensor:
    """The workspace after ``forbid_words``, with words and tails laid out as it wants them."""
    size, width = logits.shape[1], max(len(word) for _, word in words)
    x = rows_of(logits)
    tails = [([-1] * width + histories[row])[len(histories[row]) + 1 :] for row, _ in words]
    forbid_words(
        x,
        torch.tensor([row for row, _ in words]),
        torch.tensor([[-1] * (width - len(word)) + word for _, word in words]),
        torch.tensor(tails).view(len(words), width - 1).long(),
        dummy=size,
    )
    return x


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 200), num_words=st.integers(1, 20))
@pytest.mark.slow
def test_words_are_forbidden_once_they_have_begun(seed: int, size: int, num_words: int) -> None:
    """The last token of a word is forbidden in its own row if the row's last tokens are the rest of the word, and only then;
    also where the history is shorter than the word, and where words share their last token."""
    rng = random.Random(seed)
    few = min(size, 3)
    histories = [[rng.randrange(few) for _ in range(rng.randrange(7))] for _ in range(4)]
    words = [(rng.randrange(4), [rng.randrange(few) for _ in range(rng.randint(1, 4))]) for _ in range(num_words)]
    logits = random_rows(4, size, seed)
    expected = logits.clone()
    for row, word in words:
        begun = len(word) == 1 or histories[row][-(len(word) - 1) :] == word[:-1]
        if begun:
            expected[row, word[-1]] = -math.inf
    check(forbid_in(logits, histories, words), expected)


def test_a_word_by_hand() -> None:
    """After 7, 5 the word (7, 5, 2) forbids 2, (5, 3) forbids 3, (1,) forbids 1, and (5, 7, 0) forbids nothing."""
    x = forbid_in(torch.zeros(2, 9), [[7, 5], [5, 7]], [(0, [7, 5, 2]), (0, [5, 3]), (0, [1]), (0, [5, 7, 0])])
    assert (x[0, :9] == -math.inf).nonzero()[:, 0].tolist() == [1, 2, 3]
    assert (x[1, :9] == 0).all()


# Masks


@settings(max_examples=120, deadline=None)
@given(size=SIZES, seed=SEEDS, word=st.sampled_from([1, 4]), extra=st.sampled_from([0, 0, 64]))
@pytest.mark.slow
def test_masks_let_their_tokens_through(size: int, seed: int, word: int, extra: int) -> None:
    """Token t lives in bit t % 8 of byte t // 8, whatever the vocabulary's size, in masks of whole bytes or of 32-bit words,
    even longer than the workspace; what the bits beyond the vocabulary say makes no difference."""
    rng = np.random.default_rng(seed)
    num_bytes = -(-size // (8 * word)) * word + extra
    bits = rng.random((3, num_bytes * 8)) < np.array([[0.02], [0.5], [0.98]])
    masks = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))
    logits = random_rows(3, size, seed)
    x = rows_of(logits)
    allow_only(x, masks, bit_table("cpu"))
    check(x, logits.masked_fill(torch.from_numpy(~bits[:, :size]), -math.inf))


@pytest.mark.parametrize("num_bytes", [1, 3, 16, 50])
def test_masks_of_tokens(num_bytes: int) -> None:
    """``mask_of`` sets the bits of its tokens, repeated or not, and no others: lowest bit first; no tokens, no bits."""
    rng = random.Random(num_bytes)
    tokens = [rng.randrange(num_bytes * 8) for _ in range(num_bytes * 4)] + [0, num_bytes * 8 - 1]
    expected = [sum(1 << bit for bit in range(8) if byte * 8 + bit in tokens) for byte in range(num_bytes)]
    mask = mask_of(torch.tensor(tokens), num_bytes)
    assert mask.dtype == torch.uint8
    assert mask.tolist() == expected
    assert mask_of(torch.tensor([], dtype=torch.int64), num_bytes).tolist() == [0] * num_bytes
    assert mask_of(torch.arange(num_bytes * 8), num_bytes).tolist() == [ALL_BITS] * num_bytes


def test_a_mask_by_hand() -> None:
    """Byte 0b101 lets tokens 0 and 2 through, the second byte 0b10 token 9."""
    x = rows_of(torch.zeros(1, 10))
    allow_only(x, torch.tensor([[0b101, 0b10]], dtype=torch.uint8), bit_table("cpu"))
    assert (x == 0).nonzero()[:, 1].tolist() == [0, 2, 9]


def test_a_full_mask_changes_nothing() -> None:
    """Rows without a grammar may have a mask of all ones in a batch with others."""
    logits = random_rows(2, 300, 4)
    x = rows_of(logits)
    allow_only(x, torch.full((2, 40), ALL_BITS, dtype=torch.uint8), bit_table("cpu"))
    check(x, logits)
