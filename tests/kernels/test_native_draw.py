"""The native kernel that draws tokens from rows of logits."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.interfaces.sampler import SamplingConfig, SamplingContext, SequenceHistory
from ferrum_rt.kernels.cpu import NativeOps
from ferrum_rt.kernels.cpu.ops import Draws
from ferrum_rt.runtime.execution.sampler import BatchSampler
from tests.kernels.targets import every_target, kernels_for, needed_kernels

HISTORY = SequenceHistory(token_ids=[], num_prompt_tokens=0)
NOTHING_CUT: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 400},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.02},
    {"min_p": 1e-7},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.95, "min_p": 0.001},
]


@pytest.fixture(scope="module")
def ops() -> Iterator[NativeOps]:
    opened = NativeOps(needed_kernels(), 2)
    yield opened
    opened.close()


def draw(ops: NativeOps, logits: Tensor, configs: list[SamplingConfig], positions: list[int]) -> list[int]:
    """What is drawn of each row, whose tokens will stand at ``positions``; the batch's rows are in the opposite order."""
    count = len(logits)
    highest, ids = torch.empty(count), torch.empty(count, dtype=torch.int64)
    ops.argmax(highest, ids, logits)
    draws = Draws(
        torch.tensor([[config.seed, config.sample_index] for config in configs]),
        torch.tensor(
            [[config.temperature, config.top_k, config.top_p, config.min_p] for config in configs], dtype=torch.float64
        ),
    )
    before = torch.tensor([position - 1 for position in positions]).flip(0)
    ops.draw(ids, highest, logits, before, torch.arange(count).flip(0), draws)
    return ids.tolist()


def sampled(logits: Tensor, configs: list[SamplingConfig], positions: list[int]) -> list[int | None]:
    """The same by the sampler in torch."""
    count, vocab_size = logits.shape
    sampler = BatchSampler(count, vocab_size, 1024)
    for slot, config in enumerate(configs):
        sampler.assign(slot, config, HISTORY)
    found = sampler.sample(logits, SamplingContext(slots=list(range(count)), positions=positions))
    sampler.close()
    return [token.token_id for token in found]


def random_logits(rows: int, vocab_size: int, dtype: torch.dtype, spread: float, seed: int) -> Tensor:
    return (torch.randn((rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_draws_are_the_samplers(ops: NativeOps, dtype: torch.dtype, cut: dict[str, Any]) -> None:
    """Over flat and steep rows of small and large vocabularies the tokens are those of BatchSampler: but for one in some
    hundreds, where the draw falls between two tokens to the last digit."""
    wrong, total = 0, 0
    for vocab_size, spread, temperature in ((5, 1.0, 1.0), (300, 3.0, 0.7), (4096, 0.1, 1.0), (32_003, 2.0, 1.3)):
        rows = 64 if vocab_size < 10_000 else 24
        logits = random_logits(rows, vocab_size, dtype, spread, vocab_size)
        configs = [
            SamplingConfig(temperature=temperature, seed=row, sample_index=row % 3, **{**NOTHING_CUT, **cut})
            for row in range(rows)
        ]
        positions = [7 * row + 1 for row in range(rows)]
        ours, theirs = draw(ops, logits, configs, positions), sampled(logits, configs, positions)
        wrong += sum(a != b for a, b in zip(ours, theirs, strict=True))
        total += rows
    assert wrong <= total // 200


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.integers(1, 700), st.integers(1, 9), st.floats(0.05, 3.0), st.integers(0, 800), st.floats(0.0, 1.0),
    st.floats(0.0, 1.0), st.booleans(), st.integers(0, 2**62),
)  # fmt: skip
def test_only_what_is_left_is_drawn(
    vocab_size: int, levels: int, temperature: float, top_k: int, top_p: float, min_p: float, has_holes: bool, seed: int
) -> None:
    """Of rows with many equal logits, and tokens that may not come at all, a token is drawn that the cut leaves: judged by
    sorting the whole row in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (8, vocab_size), generator=generator).float()
    if has_holes:
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = -math.inf
        logits[:, -1] = 1.0
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=max(top_p, 1e-6), min_p=min_p, seed=seed)
    ops = NativeOps(needed_kernels(), 1)
    found = draw(ops, logits, [config] * 8, list(range(1, 9)))
    ops.close()
    for row, token in zip(logits.double(), found, strict=True):
        ordered, ids = torch.sort(row, descending=True, stable=True)
        weights = ((ordered - ordered[0]) / temperature).exp()
        kept = weights[: top_k or vocab_size]
        before = kept.cumsum(0) - kept
        is_left = (before < config.top_p * kept.sum() * (1 + 1e-5)) & (kept >= min_p * (1 - 1e-5)) & (kept > 0)
        if config.top_p >= 1:
            is_left = (kept >= min_p * (1 - 1e-5)) & (kept > 0)
        is_left[0] = True
        assert token in ids[: len(kept)][is_left].tolist()


def test_draws_follow_the_distribution(ops: NativeOps) -> None:
    """Of many draws each token has its share."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 3.0]).repeat(4000, 1)
    configs = [SamplingConfig(temperature=1.0, seed=11)] * 4000
    counts = torch.bincount(torch.tensor(draw(ops, logits, configs, list(range(1, 4001)))), minlength=5) / 4000
    torch.testing.assert_close(counts, logits[0].softmax(0), atol=0.03, rtol=0.0)


def test_a_row_does_not_see_the_others(ops: NativeOps) -> None:
    """Each row's token is the one that it has alone, whatever the others are cut by; greedy rows keep their likeliest."""
    logits = random_logits(len(CUTS) + 1, 5000, torch.bfloat16, 2.0, 1)
    configs = [SamplingConfig(temperature=0.9, seed=at, **{**NOTHING_CUT, **cut}) for at, cut in enumerate(CUTS)]
    configs.append(SamplingConfig(temperature=0.0))
    positions = list(range(3, 3 + len(configs)))
    together = draw(ops, logits, configs, positions)
    for at, token in enumerate(together):
        assert draw(ops, logits[at : at + 1], configs[at : at + 1], positions[at : at + 1]) == [token]
    assert together[-1] == int(logits[-1].argmax())


def test_a_row_that_is_not_sound_is_left_alone(ops: NativeOps) -> None:
    """NaN among the logits, or none that is finite: nothing is drawn, and the rows beside have theirs."""
    logits = random_logits(3, 1000, torch.float32, 1.0, 2)
    expected = draw(ops, logits[1:2], [SamplingConfig(temperature=1.0)], [5])
    logits[0, 500], logits[2] = math.nan, -math.inf
    found = draw(ops, logits, [SamplingConfig(temperature=1.0)] * 3, [4, 5, 6])
    assert found[0] == 500
    assert found[1:2] == expected


@pytest.mark.proof
@every_target
def test_every_instruction_set_draws_the_same(target: str) -> None:
    """Built for less than this machine has the kernel draws the same tokens, but for draws between two tokens."""
    logits, positions = random_logits(64, 3001, torch.bfloat16, 2.0, 9), list(range(1, 65))
    ops = NativeOps(kernels_for(target), 2)
    for cut in CUTS:
        configs = [SamplingConfig(temperature=0.8, seed=row, **{**NOTHING_CUT, **cut}) for row in range(64)]
        found = draw(ops, logits, configs, positions)
        assert sum(a != b for a, b in zip(found, sampled(logits, configs, positions), strict=True)) <= 1, cut
    ops.close()
