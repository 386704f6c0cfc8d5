"""The BatchSampler: every option in one batch, each row on its own, and what is wrong with one is no other's trouble."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import BackendError, FerrumError, RequestValidationError
from ferrum_rt.interfaces.sampler import SampledToken, SamplingConfig, SamplingContext, SequenceHistory
from ferrum_rt.interfaces.types import Mirostat, TokenId
from ferrum_rt.runtime.execution.sampler import BatchSampler

VOCABULARY = 300
MAX_LEN = 64
END = 7


def ids(*tokens: int) -> list[TokenId]:
    return [TokenId(token) for token in tokens]


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


class Peaked:
    """A LogitsProcessor that leaves one token, and notes what it was given."""

    def __init__(self, token: int) -> None:
        self._token = token
        self.seen: list[list[TokenId]] = []

    def apply(self, token_ids: list[TokenId], logits: Tensor) -> Tensor:
        self.seen.append(list(token_ids))
        logits.fill_(-math.inf)[self._token] = 0.0
        return logits


class Returns:
    """A LogitsProcessor that gives back whatever it was made with; an exception it raises."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def apply(self, token_ids: list[TokenId], logits: Tensor) -> Any:
        logits.zero_()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


class Literal:
    """A Grammar of these tokens, then the end; ``broken_at`` a position it raises."""

    def __init__(self, tokens: list[int], broken_at: int | None = None) -> None:
        self._tokens, self._broken_at, self._position = [*tokens, END], broken_at, 0

    def start(self) -> "Literal":
        return Literal(self._tokens[:-1], self._broken_at)

    def advance(self, token_id: TokenId) -> None:
        if self._position < len(self._tokens):
            assert token_id == self._tokens[self._position], "a token that the mask did not allow"
            self._position += 1

    def write_mask(self, mask: memoryview) -> None:
        if self._position == self._broken_at:
            raise RequestValidationError("response_format: too complex")
        mask[:] = bytes(len(mask))
        token = self._tokens[min(self._position, len(self._tokens) - 1)]
        mask[token // 8] = 1 << token % 8


CONFIGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7, "seed": 1},
    "top_k": {"temperature": 1.0, "top_k": 5, "seed": 2},
    "top_p": {"temperature": 1.3, "top_p": 0.9, "seed": 3},
    "min_p": {"temperature": 1.0, "min_p": 0.05, "seed": 4},
    "typical_p": {"temperature": 1.0, "typical_p": 0.5, "seed": 5},
    "mirostat": {"temperature": 1.0, "mirostat": Mirostat(tau=3.0), "seed": 6},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.5,
        "presence_penalty": 1.0,
        "frequency_penalty": 1.0,
        "seed": 7,
    },
    "greedy with bias": {"logit_bias": {3: 50.0}},
    "allowed": {"temperature": 5.0, "allowed_token_ids": [1, 2, 299], "seed": 8},
    "bad words": {"temperature": 1.0, "bad_words": [[5], [1, 2]], "seed": 9},
    "min_tokens": {"temperature": 1.0, "min_tokens": 5, "end_token_ids": frozenset({END}), "seed": 10},
    "logprobs": {"temperature": 1.0, "logprobs": 3, "seed": 11},
    "grammar": {"temperature": 1.0, "grammar": Literal([4, 5, 6]), "seed": 12},
    "everything": {
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {9: 1.0},
        "bad_words": [[1, 2, 3]],
        "min_tokens": 1,
        "end_token_ids": frozenset({END}),
        "logprobs": 5,
        "seed": 13,
        "sample_index": 2,
    },
}


def run(
    configs: list[SamplingConfig], logits: list[Tensor], history: SequenceHistory | None = None
) -> list[list[SampledToken]]:
    """What each configuration draws in each of the steps; the rows of step s are ``logits[s]``."""
    sampler = BatchSampler(len(configs), VOCABULARY, MAX_LEN)
    started = history or SequenceHistory(token_ids=ids(1, 2, 3, 1), num_prompt_tokens=4)
    try:
        for slot, config in enumerate(configs):
            sampler.assign(slot, config, started)
        steps = []
        for number, rows in enumerate(logits):
            slots = range(len(configs))
            context = SamplingContext(slots=slots, positions=[len(started.token_ids) + number] * len(slots))
            sampler.prepare(context)
            steps.append(sampler.sample(rows, context))
        return steps
    finally:
        sampler.close()


def draw(config: dict[str, Any], logits: Tensor, history: SequenceHistory | None = None) -> SampledToken:
    return run([SamplingConfig(**config)], [logits[None]], history)[0][0]


def test_no_row_depends_on_the_others() -> None:
    """Every option in one batch, in either order: each row gets bit for bit what it gets alone, for six steps."""
    configs = [SamplingConfig(**fields) for fields in CONFIGS.values()]
    logits = [random_logits(len(configs), seed) for seed in range(6)]
    together = run(configs, logits)
    backwards = run(configs[::-1], [rows.flip(0) for rows in logits])
    for row, config in enumerate(configs):
        alone = [step[0] for step in run([config], [rows[row : row + 1] for rows in logits])]
        assert [step[row] for step in together] == alone
        assert [step[len(configs) - 1 - row] for step in backwards] == alone


def test_logits_are_left_as_they_are() -> None:
    """The model's logits are not changed, whatever the rows ask for."""
    configs = [SamplingConfig(**fields) for fields in CONFIGS.values()]
    logits = random_logits(len(configs))
    before = logits.clone()
    run(configs, [logits])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_goes_on_where_it_was(name: str) -> None:
    """Given its history again after three steps, a sequence draws what it would have drawn without the break."""
    config = SamplingConfig(**CONFIGS[name])
    logits = [random_logits(1, seed) for seed in range(6)]
    unbroken = [step[0] for step in run([config], logits)]
    drawn = [item.token_id for item in unbroken[:3] if item.token_id is not None]
    history = SequenceHistory(token_ids=[*ids(1, 2, 3, 1), *drawn], num_prompt_tokens=4, mirostat_mu=unbroken[2].mirostat_mu)
    assert [step[0] for step in run([config], logits[3:], history)] == unbroken[3:]


def test_allowed_tokens_alone_are_drawn() -> None:
    """allowed_token_ids leaves nothing else, however likely."""
    logits = torch.zeros(VOCABULARY)
    logits[50] = 100.0
    drawn = {draw(CONFIGS["allowed"] | {"seed": seed}, logits).token_id for seed in range(40)}
    assert drawn == {1, 2, 299}


def test_a_bad_word_is_not_completed() -> None:
    """The last token of a bad word cannot follow the rest of it, in the prompt or in the output, and can elsewhere."""
    logits = torch.zeros(VOCABULARY)
    logits[2] = 100.0
    config: dict[str, Any] = {"bad_words": [[9, 1, 2], [5]]}
    history = SequenceHistory(token_ids=ids(8, 9, 1), num_prompt_tokens=3)
    assert draw(config, logits, history).token_id != 2
    assert draw(config, logits, SequenceHistory(token_ids=ids(9, 9), num_prompt_tokens=2)).token_id == 2
    assert draw(config, logits, SequenceHistory(token_ids=ids(1), num_prompt_tokens=1)).token_id == 2
    logits[5] = 200.0
    assert draw(config, logits, SequenceHistory(token_ids=ids(4), num_prompt_tokens=1)).token_id == 2


def test_an_end_token_waits_for_min_tokens() -> None:
    """An end token is drawn once there are min_tokens outputs, and not before."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, END] = 100.0
    config = SamplingConfig(min_tokens=3, end_token_ids=frozenset({END}))
    steps = run([config], [logits] * 5)
    assert [step[0].token_id == END for step in steps] == [False, False, False, True, True]


def test_repetition_penalty_looks_at_prompt_and_output_and_presence_at_the_output() -> None:
    """A token of the prompt counts for the repetition penalty alone."""
    logits = torch.zeros(VOCABULARY)
    logits[3], logits[4] = 2.0, 1.9
    prompt = SequenceHistory(token_ids=ids(3), num_prompt_tokens=1)
    output = SequenceHistory(token_ids=ids(8, 3), num_prompt_tokens=1)
    assert draw({"repetition_penalty": 1.5}, logits, prompt).token_id == 4
    assert draw({"presence_penalty": 1.0}, logits, prompt).token_id == 3
    assert draw({"presence_penalty": 1.0}, logits, output).token_id == 4
    assert draw({"frequency_penalty": 1.0}, logits, output).token_id == 4
    assert draw({"frequency_penalty": -1.0}, logits, output).token_id == 3


def test_logprobs_are_the_models_own() -> None:
    """Log-probabilities are those of the unchanged logits: of the token, then of the likeliest."""
    logits = random_logits(1)[0]
    expected = logits.double().log_softmax(dim=-1)
    best = expected.topk(3)
    scores = draw({"logit_bias": {17: 100.0}, "logprobs": 3, "temperature": 0.5}, logits).scores
    assert scores is not None
    assert list(scores.token_ids) == [17, *best.indices.tolist()]
    assert list(scores.logprobs) == pytest.approx([expected[17].item(), *best.values.tolist()], abs=1e-5)


def test_zero_logprobs_are_the_tokens_own() -> None:
    """logprobs=0 gives the drawn token's alone, and None gives none."""
    found = run([SamplingConfig(logprobs=0), SamplingConfig(logprobs=2), SamplingConfig()], [random_logits(3)])[0]
    assert [None if item.scores is None else len(item.scores.token_ids) for item in found] == [1, 3, None]


def test_a_grammar_is_followed_to_its_end() -> None:
    """Masks hold each draw to the grammar, and past its end there is only the end token."""
    config = SamplingConfig(temperature=2.0, grammar=Literal([9, 250, 9]))
    steps = run([config, SamplingConfig()], [random_logits(2, seed) for seed in range(6)])
    assert [step[0].token_id for step in steps] == [9, 250, 9, END, END, END]


def test_a_grammar_that_fails_fails_its_own_row() -> None:
    """What a matcher raises is that row's error; the other draws what it always draws."""
    configs = [SamplingConfig(grammar=Literal([9, 9, 9], broken_at=1)), SamplingConfig(temperature=1.0, seed=3)]
    logits = [random_logits(2, seed) for seed in range(2)]
    steps = run(configs, logits)
    assert steps[0][0].token_id == 9
    assert isinstance(steps[1][0].error, RequestValidationError)
    assert steps[1][0].token_id is None
    alone = run(configs[1:], [rows[1:] for rows in logits])
    assert [step[1] for step in steps] == [step[0] for step in alone]


def test_a_callers_processor_sees_all_tokens_and_decides() -> None:
    """A LogitsProcessor is given prompt and output, and a copy of the logits."""
    first, second = Peaked(40), Peaked(41)
    config = SamplingConfig(temperature=1.0, processors=[first, second])
    steps = run([config], [random_logits(1, seed) for seed in range(3)])
    assert [step[0].token_id for step in steps] == [41, 41, 41]
    assert first.seen == second.seen == [ids(1, 2, 3, 1), ids(1, 2, 3, 1, 41), ids(1, 2, 3, 1, 41, 41)]


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (ValueError("no"), "raised ValueError"),
        (SystemExit(3), "raised SystemExit"),
        (None, "NoneType"),
        ([0.0] * VOCABULARY, "list"),
        (torch.zeros(VOCABULARY + 1), "shape"),
        (torch.zeros(1, VOCABULARY), "shape"),
        (torch.zeros(VOCABULARY, dtype=torch.int64), "floats"),
        (torch.full((VOCABULARY,), math.nan), "floats"),
        (torch.full((VOCABULARY,), math.inf), "floats"),
    ],
    ids=str,
)
def test_a_callers_processor_that_fails_fails_its_own_row(result: Any, fault: str) -> None:
    """A processor that raises or returns nonsense is its request's error, by its number; the row beside is untouched."""
    configs = [
        SamplingConfig(temperature=1.0, processors=[Returns(torch.zeros(VOCABULARY)), Returns(result)]),
        SamplingConfig(temperature=1.0, seed=3, repetition_penalty=1.2),
    ]
    logits = [random_logits(2)]
    found = run(configs, logits)[0]
    assert isinstance(found[0].error, RequestValidationError)
    assert "logits_processors[1]" in str(found[0].error)
    assert fault in str(found[0].error)
    assert found[1] == run(configs[1:], [logits[0][1:]])[0][0]


@pytest.mark.parametrize("name", ["greedy", "temperature", "top_k", "everything"])
def test_logits_that_are_not_numbers_fail_their_own_row(name: str) -> None:
    """NaN in a row is that row's BackendError, however it is drawn from."""
    configs = [SamplingConfig(**CONFIGS[name]), SamplingConfig(**CONFIGS[name])]
    logits = random_logits(2)
    logits[0, 17] = math.nan
    broken, sound = run(configs, [logits])[0]
    assert isinstance(broken.error, BackendError)
    assert broken.token_id is None
    assert sound == run(configs[1:], [logits[1:]])[0][0]


def test_rules_that_leave_no_token_are_the_requests_fault() -> None:
    """When all is forbidden the error says by what, and the row beside is untouched."""
    logits = random_logits(2)
    nothing: dict[str, Any] = {"allowed_token_ids": [5], "bad_words": [[5]]}
    error: FerrumError | None = run([SamplingConfig(**nothing), SamplingConfig()], [logits])[0][0].error
    assert isinstance(error, RequestValidationError)
    assert "allowed_token_ids" in str(error)


def test_sample_indices_draw_differently() -> None:
    """Samples of one seed are different draws, and each is the same again."""
    logits = torch.zeros(VOCABULARY)
    drawn = [draw({"temperature": 1.0, "seed": 5, "sample_index": index}, logits).token_id for index in range(20)]
    assert len(set(drawn)) > 15
    assert drawn == [draw({"temperature": 1.0, "seed": 5, "sample_index": index}, logits).token_id for index in range(20)]


def test_mirostat_is_reported_to_be_given_back() -> None:
    """Mirostat's bound moves with each surprise, and other rows report none."""
    steps = run([SamplingConfig(**CONFIGS["mirostat"]), SamplingConfig()], [random_logits(2, seed) for seed in range(3)])
    bounds = [step[0].mirostat_mu for step in steps]
    assert len(set(bounds)) == 3
    assert all(step[1].mirostat_mu is None for step in steps)


def test_a_slot_forgets_its_last_sequence() -> None:
    """After a slot was everything it could be, a plain sequence in it draws as in a new one."""
    sampler = BatchSampler(1, VOCABULARY, MAX_LEN)
    context = SamplingContext(slots=[0], positions=[4])
    history = SequenceHistory(token_ids=ids(1, 2, 3, 1), num_prompt_tokens=4)
    plain = SamplingConfig(temperature=1.0, seed=9)
    logits = random_logits(1)
    expected = run([plain], [logits])[0][0]
    for fields in CONFIGS.values():
        for config in (SamplingConfig(**fields), plain):
            sampler.assign(0, config, history)
            sampler.prepare(context)
            found = sampler.sample(logits, context)[0]
        assert found == expected
    sampler.close()
