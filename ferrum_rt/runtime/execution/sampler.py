"""The Sampler: one configuration per slot, the rows of a step drawn together."""

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import BackendError, FerrumError, RequestValidationError
from ferrum_rt.interfaces.sampler import (
    GREEDY_BELOW,
    SampledToken,
    SamplingConfig,
    SamplingContext,
    SequenceHistory,
    TokenScores,
)
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.kernels.sampling import (
    NUM_CANDIDATES,
    Truncation,
    argmax,
    draw,
    draw_truncated,
    log_sum_exp,
    top_candidates,
    uniform,
    workspace,
)
from ferrum_rt.runtime.execution.processors import Processors


class _Group(enum.IntEnum):
    """How a row is drawn; they stand in the workspace in this order."""

    GREEDY = 0
    WHOLE = 1  # from the whole vocabulary
    PART = 2


class BatchSampler:
    """The grouping of rows looks at each row alone, and so does what is done to it: the rest of the batch cannot change what
    a row draws."""

    def __init__(self, num_slots: int, vocab_size: int, max_model_len: int, device: torch.device | str = "cpu") -> None:
        self._num_slots, self._vocab_size, self._device = num_slots, vocab_size, device
        self._processors = Processors(num_slots, vocab_size, max_model_len, device)
        self._configs = [SamplingConfig()] * num_slots
        self._groups = [_Group.GREEDY] * num_slots
        self._mirostat_mu = [math.inf] * num_slots
        self._workspace: Tensor | None = None

    def assign(self, slot: int, config: SamplingConfig, history: SequenceHistory) -> None:
        self._configs[slot], self._groups[slot] = config, _group(config)
        if config.mirostat is None:
            self._mirostat_mu[slot] = math.inf
        else:
            self._mirostat_mu[slot] = 2 * config.mirostat.tau if history.mirostat_mu is None else history.mirostat_mu
        self._processors.assign(slot, config, history)

    def prepare(self, context: SamplingContext) -> None:
        self._processors.prepare(context)

    def sample(self, logits: Tensor, context: SamplingContext) -> list[SampledToken]:
        """A token per row of ``logits`` [rows, vocabulary], which are left as they are."""
        configs = [self._configs[slot] for slot in context.slots]
        groups = [self._groups[slot] for slot in context.slots]
        rows = sorted(range(len(groups)), key=groups.__getitem__)
        drawn, errors, bounds = self._draw(logits, rows, context)
        tokens: list[TokenId | None] = [None] * len(groups)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = None if row in errors else token
        scores = self._score_drawn(logits, tokens, configs)
        # What is remembered comes last: a step that ran out of memory before here can be sampled again.
        for slot, bound in bounds.items():
            self._mirostat_mu[slot] = bound
        self._processors.accept(context, tokens)
        return [
            SampledToken(token, scores.get(row), self._mu_of(slot), errors.get(row))
            for row, (slot, token) in enumerate(zip(context.slots, tokens, strict=True))
        ]

    def score(self, logits: Tensor, token_ids: Sequence[TokenId], num_top: int) -> list[TokenScores]:
        """For each row the log-probability of its token, and the ``num_top`` likeliest; at most as many rows as slots."""
        x = self._copy(logits)
        own = x.gather(1, self._tensor(token_ids)[:, None])
        best, ids = top_candidates(x, max(1, num_top))
        total = log_sum_exp(x, best[:, 0])[:, None]
        rows = zip(token_ids, (own - total).tolist(), ids.tolist(), (best - total).tolist(), strict=True)
        return [
            TokenScores([token_id, *best_ids[:num_top]], logprob + logprobs[:num_top])
            for token_id, logprob, best_ids, logprobs in rows
        ]

    def close(self) -> None:
        self._processors.close()

    def _draw(
        self, logits: Tensor, rows: list[int], context: SamplingContext
    ) -> tuple[list[TokenId], dict[int, FerrumError], dict[int, float]]:
        """A token for each of ``rows``, sorted by group; by row why some can have none; by slot Mirostat's next bound."""
        x = self._copy(logits if rows == list(range(len(logits))) else logits[rows])
        failed = self._processors.apply(x, rows, context)
        highest, tokens = argmax(x)
        for at in _unsound(highest):
            was_sound = bool(argmax(logits[rows[at] : rows[at] + 1])[0].isfinite())
            failed.setdefault(at, _nothing_left() if was_sound else not_numbers())
            x[at], highest[at] = 0.0, 0.0

        slots = [context.slots[row] for row in rows]
        configs = [self._configs[slot] for slot in slots]
        groups = [self._groups[slot] for slot in slots]
        draws = uniform(
            self._tensor([config.seed for config in configs]),
            self._tensor([context.positions[row] for row in rows]),
            self._tensor([config.sample_index for config in configs]),
        )
        whole = slice(groups.count(_Group.GREEDY), len(groups) - groups.count(_Group.PART))
        if configs[whole]:
            temperature = self._tensor([config.temperature for config in configs[whole]])
            tokens[whole] = draw(x[whole], highest[whole], temperature, draws[whole])
        part, bounds = slice(whole.stop, len(groups)), dict[int, float]()
        if configs[part]:
            cut, count = self._truncation(slots[part])
            tokens[part], surprise = draw_truncated(x[part], highest[part], cut, draws[part], count=count)
            bounds = self._next_bounds(slots[part], surprise)
        return tokens.tolist(), {rows[at]: error for at, error in failed.items()}, bounds

    def _truncation(self, slots: list[int]) -> tuple[Truncation, int]:
        """And how many candidates to look at."""
        configs = [self._configs[slot] for slot in slots]
        top_k = [0 if config.top_k >= self._vocab_size else config.top_k for config in configs]
        cut = Truncation(
            temperature=self._tensor([config.temperature for config in configs]),
            top_k=self._tensor(top_k),
            top_p=self._tensor([config.top_p for config in configs]),
            min_p=self._tensor([config.min_p for config in configs]),
            typical_p=self._tensor([config.typical_p for config in configs]),
            max_surprise=self._tensor([self._mirostat_mu[slot] for slot in slots]),
        )
        return cut, max(top_k) if all(top_k) else max(NUM_CANDIDATES, *top_k)

    def _next_bounds(self, slots: list[int], surprise: Tensor) -> dict[int, float]:
        """Mirostat's bounds, moved by how far the surprise was off its target (arXiv:2007.14966, algorithm 2)."""
        if not any(self._configs[slot].mirostat for slot in slots):
            return {}
        return {
            slot: self._mirostat_mu[slot] - mirostat.eta * (bits - mirostat.tau)
            for slot, bits in zip(slots, surprise.tolist(), strict=True)
            if (mirostat := self._configs[slot].mirostat) is not None
        }

    def _mu_of(self, slot: int) -> float | None:
        return None if self._configs[slot].mirostat is None else self._mirostat_mu[slot]

    def _score_drawn(
        self, logits: Tensor, tokens: list[TokenId | None], configs: list[SamplingConfig]
    ) -> dict[int, TokenScores]:
        rows = [
            row
            for row, (token, config) in enumerate(zip(tokens, configs, strict=True))
            if token is not None and config.logprobs is not None
        ]
        if not rows:
            return {}
        counts = [configs[row].logprobs or 0 for row in rows]
        scores = self.score(logits[rows], [token for row in rows if (token := tokens[row]) is not None], max(counts))
        return {
            row: TokenScores(score.token_ids[: count + 1], score.logprobs[: count + 1])
            for row, score, count in zip(rows, scores, counts, strict=True)
        }

    def _copy(self, logits: Tensor) -> Tensor:
        """The rows in float32, in the workspace."""
        if self._workspace is None:
            self._workspace = workspace(self._num_slots, self._vocab_size, self._device)
        x = self._workspace[: len(logits)]
        x[:, : self._vocab_size] = logits
        x[:, self._vocab_size :] = -math.inf
        return x

    def _tensor(self, values: Sequence[int] | Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)


def _group(config: SamplingConfig) -> _Group:
    if config.temperature <= GREEDY_BELOW:
        return _Group.GREEDY
    return _Group.PART if config.truncates else _Group.WHOLE


def _unsound(highest: Tensor) -> list[int]:
    """Rows without a finite maximum: NaN among them, or nothing but -inf."""
    is_sound: list[bool] = highest.isfinite().tolist()
    return [row for row, sound in enumerate(is_sound) if not sound]


def not_numbers() -> BackendError:
    """A row of logits has no largest one."""
    return BackendError("the model's logits are not numbers (NaN) for this request")


def _nothing_left() -> RequestValidationError:
    return RequestValidationError(
        "no token is left to choose from: allowed_token_ids, bad_words, logit_bias, min_tokens, response_format and "
        "logits_processors forbid all of them together"
    )
