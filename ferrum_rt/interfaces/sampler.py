"""From logits to tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.grammar import Grammar
from ferrum_rt.interfaces.types import Mirostat, TokenId

T_contra = TypeVar("T_contra", contravariant=True)

GREEDY_BELOW = 1e-5
"""Temperatures too small to divide by."""


class SamplingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """SamplingParams after the model's defaults are filled in: what the sampler needs for one sequence, all neutral when
    left alone except ``temperature``, where 0 is greedy. Words are token ids here."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    mirostat: Mirostat | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[Sequence[int]] = ()
    min_tokens: int = 0
    end_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    grammar: Grammar | None = None
    processors: Sequence["LogitsProcessor[Any]"] = ()
    seed: int = 0
    sample_index: int = 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def uses_history(self) -> bool:
        """Whether the sampler looks at the tokens so far."""
        return self.has_penalties or bool(self.bad_words) or self.grammar is not None or bool(self.processors)

    @property
    def changes_logits(self) -> bool:
        """Whether anything happens to the logits before a token is drawn."""
        return self.uses_history or bool(self.logit_bias) or self.allowed_token_ids is not None or self.min_tokens > 0

    @property
    def truncates(self) -> bool:
        """Whether only a part of the vocabulary is drawn from."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1 or self.mirostat is not None

    @property
    def is_plain(self) -> bool:
        """Whether a token is drawn from the model's own logits by nothing but temperature, top_k, top_p, min_p and seed, and
        nothing is asked but the token."""
        return not self.changes_logits and self.typical_p >= 1 and self.mirostat is None and self.logprobs is None

    @property
    def is_greedy(self) -> bool:
        """Whether the token is the likeliest by the model's own logits, and nothing is asked but the token."""
        return self.is_plain and self.temperature <= GREEDY_BELOW


class SequenceHistory(msgspec.Struct, frozen=True, kw_only=True):
    """What the sampler must know of a sequence that gets a slot: its tokens so far (none, if its configuration looks at
    none), how many of them are the prompt's, and Mirostat's running bound on surprise (None at its start)."""

    token_ids: Sequence[TokenId] = ()
    num_prompt_tokens: int = 0
    mirostat_mu: float | None = None


class SamplingContext(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one step: row i of the logits belongs to slot ``slots[i]``; the token drawn from it will stand at
    ``positions[i]`` of its sequence."""

    slots: Sequence[int]
    positions: Sequence[int]


class TokenScores(msgspec.Struct, frozen=True, gc=False):
    """Log-probabilities of candidates for one position: first of the token that stands there, then of the likeliest, best
    first."""

    token_ids: Sequence[TokenId]
    logprobs: Sequence[float]


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """What was drawn from one row; ``error`` says why there is no token. ``mirostat_mu`` is for the history of the next
    slot this sequence gets."""

    token_id: TokenId | None
    scores: TokenScores | None = None
    mirostat_mu: float | None = None
    error: FerrumError | None = None


class LogitsProcessor(Protocol[T_contra]):
    """A caller's own change to one sequence's logits before anything is drawn from them."""

    def apply(self, token_ids: list[TokenId], logits: T_contra) -> Any:
        """The new logits [vocabulary], given those of the model (float32, a copy: it may be changed in place) and all the
        tokens so far. Called in the executor's thread; what it raises fails its own request."""
        ...


class Sampler(Protocol[T_contra]):
    """Draws one token per row. For each step ``prepare`` is called before the model runs, ``sample`` after."""

    def assign(self, slot: int, config: SamplingConfig, history: SequenceHistory) -> None:
        """Use ``config`` for the rows of ``slot`` from now on."""
        ...

    def prepare(self, context: SamplingContext) -> None:
        """Begin whatever can go on while the model runs."""
        ...

    def sample(self, logits: T_contra, context: SamplingContext) -> Sequence[SampledToken]:
        """A token per row of ``logits`` [rows, vocabulary]."""
        ...

    def score(self, logits: T_contra, token_ids: Sequence[TokenId], num_top: int) -> Sequence[TokenScores]:
        """For each row the log-probability of its token, and the ``num_top`` likeliest; at most as many rows as slots."""
        ...

    def close(self) -> None:
        """Give back threads."""
        ...
