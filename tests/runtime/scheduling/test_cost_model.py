"""What is learnt from how long steps take."""

import random

import pytest

from ferrum_rt.runtime.scheduling.cost_model import CostModel, StepWork


def work(generator: random.Random) -> StepWork:
    sequences = generator.randint(1, 64)
    return StepWork(sequences + generator.choice([0, 0, 0, 256]), sequences, sequences * generator.randint(10, 2000))


def seconds(item: StepWork, factor: float = 1.0) -> float:
    return factor * (0.004 + 2e-5 * item.num_tokens + 1e-5 * item.num_sequences + 3e-8 * item.num_context)


def learn(model: CostModel, steps: int, *, factor: float = 1.0, noise: float = 0.0, seed: int = 0) -> None:
    generator = random.Random(seed)
    for _ in range(steps):
        item = work(generator)
        model.observe(item, seconds(item, factor) * (1 + noise * generator.uniform(-1, 1)))


def worst(model: CostModel, factor: float = 1.0) -> float:
    """The largest relative error over unseen steps."""
    generator = random.Random(99)
    items = [work(generator) for _ in range(100)]
    return max(abs(model.predict(item) / seconds(item, factor) - 1) for item in items)


def test_it_learns_what_steps_cost() -> None:
    """From 200 steps whose times vary by 20 % unseen ones are predicted to 10 %."""
    model = CostModel()
    learn(model, 200, noise=0.2)
    assert worst(model) < 0.1


def test_it_says_nothing_before_it_has_seen_enough() -> None:
    """Without observations every step is free, and any number of tokens fits."""
    model = CostModel()
    learn(model, 15)
    assert not model.is_fitted
    assert model.predict(StepWork(10, 10, 10)) == 0
    assert model.tokens_within(0.001, StepWork(10, 10, 10)) == 2**31


def test_a_pause_of_the_host_is_no_lesson() -> None:
    """Steps that took a second longer, one in ten, do not spoil what was learnt."""
    model = CostModel()
    learn(model, 100)
    for number in range(20):
        learn(model, 9, seed=number)
        model.observe(StepWork(16, 16, 1000), 1.0)
    assert worst(model) < 0.05


def test_a_slower_machine_is_learnt_anew() -> None:
    """When every step takes ten times as long, the model believes it within 400 steps."""
    model = CostModel()
    learn(model, 200)
    learn(model, 400, factor=10)
    assert worst(model, factor=10) < 0.2


def test_nothing_costs_less_than_nothing() -> None:
    """Where tokens and sequences are always as many, no coefficient comes out negative, and the sum is right."""
    model = CostModel()
    for count in range(1, 200):
        model.observe(StepWork(count, count, 100), 0.01 + count * 1e-4)
    assert all(coefficient >= 0 for coefficient in model.coefficients)
    assert model.predict(StepWork(100, 100, 100)) == pytest.approx(0.02, rel=0.05)


def test_tokens_within_a_time() -> None:
    """As many tokens as are asked for take the time that was given, beside a step's other work."""
    model = CostModel()
    learn(model, 200)
    base = StepWork(32, 32, 16_000)
    tokens = model.tokens_within(0.02, base)
    assert model.predict(base._replace(num_tokens=32 + tokens)) == pytest.approx(0.02, rel=0.01)
    assert model.tokens_within(0.001, base) == 0
