"""What the graph's sampler draws, on the emulation of FlashInfer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams, draw_in_graph
from ferrum_rt.kernels.sampling import Truncation, truncate, uniform
from tests.fakes import flashinfer as emulation

VOCAB_SIZE = 300  # more than two blocks of 128, and not a multiple


def params(rows: int, **fields: float) -> DrawParams:
    """The same for every row but its number; neutral, but for a temperature of 1, where nothing else is said."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    types, values = {"top_k": torch.int32}, {**neutral, **fields}
    how = {name: torch.full((rows,), values[name], dtype=types.get(name, torch.float32)) for name in neutral}
    return DrawParams(**how, draws=numbers(rows, 0))


def numbers(rows: int, seed: int) -> Tensor:
    return uniform(torch.tensor(seed), torch.arange(rows), torch.tensor(0))


def rows_of(how: DrawParams, rows: Tensor | slice) -> DrawParams:
    return DrawParams(*(field[rows] for field in how))


def random_logits(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without two equal ones in a row, so that a bound is where everybody puts it."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(rows)])
    return (order * 0.05 + torch.rand(VOCAB_SIZE, generator=generator) * 0.01).to(dtype)


def draw(logits: Tensor, how: DrawParams, form: DrawForm = DrawForm.TRUNCATED) -> list[int]:
    drawn = draw_in_graph(logits, how, form, emulation)
    assert drawn.dtype == torch.int64
    tokens: list[int] = drawn.tolist()
    return tokens


def kept_ids(logits: Tensor, how: DrawParams) -> set[int]:
    """What the CPU's sampler keeps of a row [1, V]."""
    values, ids = logits.float().sort(dim=-1, descending=True)
    weights = ((values - values[:, :1]) / how.temperature[:, None]).exp()
    one = torch.ones(1)
    cut = Truncation(how.temperature, how.top_k.long(), how.top_p, how.min_p, one, one * math.inf)
    kept, _ = truncate(weights, cut, weights.sum(dim=-1))
    return set(ids[0, kept[0] > 0].tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40, VOCAB_SIZE, 10**6]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_what_is_drawn_from_is_what_the_cpu_keeps(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Of 200 draws all lie in the part that the CPU's sampler leaves; if that is small, each of its tokens comes up."""
    row = random_logits(1, seed)
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = kept_ids(row, params(1, **fields))
    how = params(200, **fields)._replace(draws=numbers(200, seed))
    drawn = set(draw(row.expand(200, -1).contiguous(), how))
    assert drawn <= expected
    if len(expected) <= 2 and temperature > 1:
        assert drawn == expected


def test_draws_follow_the_distribution() -> None:
    """20,000 draws from five tokens are within five standard deviations of softmax(logits / temperature)."""
    count, logits = 20_000, torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    drawn = torch.tensor(draw(logits.expand(count, -1).contiguous(), params(count, temperature=0.7))).bincount(minlength=5)
    shares = torch.softmax(logits.double() / 0.7, dim=-1)
    deviation = (count * shares * (1 - shares)).sqrt()
    assert ((drawn - count * shares).abs() < 5 * deviation).all()


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), count=st.integers(1, 6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_is_drawn_by_its_own_numbers(order: list[int], count: int, dtype: torch.dtype) -> None:
    """Whatever other rows stand around it, and wherever it stands: what FlashInfer's own samplers would not do."""
    logits = random_logits(6, 3, dtype)
    how = params(6, top_k=50, top_p=0.9)._replace(temperature=torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 3.0]))
    alone = [draw(logits[row : row + 1], rows_of(how, slice(row, row + 1)))[0] for row in range(6)]
    chosen = torch.tensor(order[:count])
    together = draw(logits[chosen], rows_of(how, chosen))
    assert together == [alone[row] for row in order[:count]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_form_that_is_enough_draws_the_same(dtype: torch.dtype) -> None:
    """A greedy row has its token in all three forms, a row of the whole vocabulary in two; beside rows that want more, the
    least weights and the first and last numbers too."""
    logits = (random_logits(90, 4, dtype).float() * 20).to(dtype)
    how = params(90, min_p=1e-7)
    how.temperature[:30] = 0
    how.min_p[30:60] = 0
    how.top_k[80:], how.top_p[85:] = 3, 0.5
    how.draws[40], how.draws[41] = 0.0, 1 - 2.0**-53
    tokens = draw(logits, how)
    assert draw(logits[:30], rows_of(how, slice(30)), DrawForm.GREEDY) == tokens[:30]
    assert draw(logits[:80], rows_of(how, slice(80)), DrawForm.WHOLE) == tokens[:80]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_first_of_the_likeliest(dtype: torch.dtype) -> None:
    """With a temperature of 0 or nearly so, whatever the other fields; the logits are left as they were."""
    logits = random_logits(3, 5, dtype).clamp_(max=12.0)
    before, first = logits.clone(), [int(row.argmax()) for row in logits]
    for temperature in (0.0, 1e-6):
        assert draw(logits, params(3, temperature=temperature, top_p=0.9, min_p=0.2)) == first
    assert torch.equal(logits, before)


def test_rows_that_are_not_sound_are_told_apart() -> None:
    """NaN anywhere, +inf, or nothing but -inf give -1, greedy or not; the rows beside them are drawn as if alone. A row with
    some -inf is sound, and never draws those."""
    logits = random_logits(6, 1)
    logits[1, 7], logits[2, 299], logits[3], logits[4] = math.nan, math.inf, -math.inf, math.nan
    logits[5, 1:] = -math.inf
    for temperature in (0.0, 1.0):
        how = params(6, temperature=temperature, top_k=9, top_p=0.8)
        drawn = draw(logits, how)
        assert drawn[1:5] == [-1] * 4
        assert drawn[0] == draw(logits[:1], rows_of(how, slice(1)))[0]
        assert drawn[5] == 0
