"""What requests do to their logits before a token is drawn: each in its own rows, all in a few calls for the batch."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferrum_rt.interfaces.errors import BackendError, FerrumError, RequestValidationError, without_words
from ferrum_rt.interfaces.grammar import GrammarMatcher
from ferrum_rt.interfaces.sampler import LogitsProcessor, SamplingConfig, SamplingContext, SequenceHistory
from ferrum_rt.interfaces.types import TokenId
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
from ferrum_rt.runtime.threads.worker import deep_stacks

_ANYTHING = -1  # in a word: whatever the token
_NOTHING = -2  # in a text: before its start


@dataclass(slots=True, eq=False)
class _Slot:
    """``bias``, ``ends`` and ``words`` are the configuration's, as tensors; ``allowed`` a mask. ``unseen`` tokens have come
    since the matcher was asked last."""

    config: SamplingConfig
    num_prompt_tokens: int = 0
    bias: tuple[Tensor, Tensor] | None = None
    ends: Tensor | None = None
    words: Tensor | None = None
    allowed: NDArray[np.uint8] | None = None
    matcher: GrammarMatcher | None = None
    unseen: list[TokenId] = field(default_factory=list)
    error: FerrumError | None = None


class Processors:
    """Keeps per slot what its configuration asks for, and the tokens so far where it looks at them.

    Grammars run in a thread of their own, from ``prepare`` to ``apply``, so beside the model.
    """

    def __init__(self, num_slots: int, vocab_size: int, max_model_len: int, device: torch.device | str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._slots = [_Slot(SamplingConfig()) for _ in range(num_slots)]
        self._history = torch.zeros((num_slots, max_model_len), dtype=torch.int64, device=device)
        self._masks = torch.full((num_slots, (vocab_size + 31) // 32 * 4), ALL_BITS, dtype=torch.uint8)
        self._mask_bytes = self._masks.numpy()  # the same memory
        self._table = bit_table(device)
        self._thread: ThreadPoolExecutor | None = None
        self._masks_written: Future[None] | None = None

    def assign(self, slot: int, config: SamplingConfig, history: SequenceHistory) -> None:
        """The slot's rows follow ``config`` from now on."""
        if self._slots[slot].allowed is not None or self._slots[slot].matcher is not None:
            self._mask_bytes[slot] = ALL_BITS
        state = self._slots[slot] = _Slot(config, history.num_prompt_tokens)
        if not config.changes_logits:
            return
        if history.token_ids:
            self._history[slot, : len(history.token_ids)] = torch.tensor(history.token_ids, dtype=torch.int64)
        if config.logit_bias:
            bias = torch.tensor(list(config.logit_bias.values()), device=self._device)
            state.bias = self._tensor(list(config.logit_bias)), bias
        if config.min_tokens:
            state.ends = self._tensor(sorted(config.end_token_ids))
        if config.bad_words:
            longest = max(len(word) for word in config.bad_words)
            words = [[_ANYTHING] * (longest - len(word)) + list(word) for word in config.bad_words]
            state.words = self._tensor(words)
        if config.allowed_token_ids is not None:
            ids = torch.tensor(config.allowed_token_ids, dtype=torch.int64)
            state.allowed = mask_of(ids, self._masks.shape[1]).numpy()
            self._mask_bytes[slot] = state.allowed
        if config.grammar is not None:
            state.matcher = config.grammar.start()
            state.unseen = list(history.token_ids[history.num_prompt_tokens :])

    def prepare(self, context: SamplingContext) -> None:
        """Let the grammars of these rows' slots say what may come next."""
        waiting = [slot for slot in context.slots if self._slots[slot].matcher is not None]
        if waiting:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="ferrum-grammar-masks")
                with deep_stacks():
                    self._thread.submit(int).result()  # starts it
            self._masks_written = self._thread.submit(self._write_masks, waiting)

    def apply(self, x: Tensor, rows: Sequence[int], context: SamplingContext) -> dict[int, FerrumError]:
        """Change ``x``, whose row i is the context's row ``rows[i]``; returns what went wrong, by i."""
        slots = [context.slots[row] for row in rows]
        positions = [context.positions[row] for row in rows]
        states = [self._slots[slot] for slot in slots]
        if not any(state.config.changes_logits for state in states):
            return {}
        errors = self._run_callers_own(x, states, slots, positions)
        if any(state.config.has_penalties for state in states):
            self._penalize(x, states, slots, positions)
        self._add_biases(x, states)
        self._forbid_words(x, states, slots, positions)
        self._forbid_ends(x, states, positions)
        errors |= self._apply_masks(x, states, slots)
        return errors

    def accept(self, context: SamplingContext, tokens: Sequence[TokenId | None]) -> None:
        """These were drawn."""
        kept = [
            (slot, position, token)
            for slot, position, token in zip(context.slots, context.positions, tokens, strict=True)
            if token is not None and self._slots[slot].config.uses_history
        ]
        if not kept:
            return
        slots, positions, known = zip(*kept, strict=True)
        self._history[list(slots), list(positions)] = self._tensor(known)
        for slot, _, token in kept:
            if self._slots[slot].matcher is not None:
                self._slots[slot].unseen.append(token)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    # -- before the model has run -------------------------------------------------------------------------------------

    def _write_masks(self, slots: list[int]) -> None:
        """In the grammars' thread."""
        for slot in slots:
            state = self._slots[slot]
            assert state.matcher is not None
            try:
                for token in state.unseen:
                    state.matcher.advance(token)
                state.unseen.clear()
                state.matcher.write_mask(self._mask_bytes[slot].data)
            except FerrumError as error:
                state.error = error
            except Exception as error:  # whatever it is, it is one request's
                state.error = without_words(BackendError, "the grammar of this request's output failed", error)
            if state.allowed is not None:
                self._mask_bytes[slot] &= state.allowed

    # -- after --------------------------------------------------------------------------------------------------------

    def _run_callers_own(
        self, x: Tensor, states: list[_Slot], slots: list[int], positions: list[int]
    ) -> dict[int, FerrumError]:
        errors: dict[int, FerrumError] = {}
        for row, state in enumerate(states):
            if not state.config.processors:
                continue
            token_ids = self._history[slots[row], : positions[row]].tolist()
            try:
                for number, processor in enumerate(state.config.processors):
                    name = f"logits_processors[{number}]"
                    x[row, : self._vocab_size] = _run(name, processor, list(token_ids), x[row, : self._vocab_size].clone())
            except FerrumError as error:
                errors[row] = error
        return errors

    def _penalize(self, x: Tensor, states: list[_Slot], slots: list[int], positions: list[int]) -> None:
        dummy = self._vocab_size
        configs = [state.config for state in states]
        lengths = [position if config.has_penalties else 0 for position, config in zip(positions, configs, strict=True)]
        known = self._history[slots, : max(lengths)]
        at = torch.arange(known.shape[1], device=self._device)
        is_known = at < self._tensor(lengths)[:, None]
        if any(config.repetition_penalty != 1 for config in configs):
            penalty = torch.tensor([config.repetition_penalty for config in configs], device=self._device)
            penalize_repetition(x, known.where(is_known, dummy), penalty)
        if any(config.presence_penalty or config.frequency_penalty for config in configs):
            presence = torch.tensor([config.presence_penalty for config in configs], device=self._device)
            frequency = torch.tensor([config.frequency_penalty for config in configs], device=self._device)
            is_output = is_known & (at >= self._tensor([state.num_prompt_tokens for state in states])[:, None])
            penalize_presence(x, known.where(is_output, dummy), presence, frequency)

    def _add_biases(self, x: Tensor, states: list[_Slot]) -> None:
        found = [(row, *state.bias) for row, state in enumerate(states) if state.bias is not None]
        if found:
            rows, ids, bias = zip(*found, strict=True)
            add_bias(x, self._repeat(rows, ids), torch.cat(ids), torch.cat(bias))

    def _forbid_words(self, x: Tensor, states: list[_Slot], slots: list[int], positions: list[int]) -> None:
        found = [(row, state.words) for row, state in enumerate(states) if state.words is not None]
        if not found:
            return
        rows, groups = zip(*found, strict=True)
        longest = max(words.shape[1] for words in groups)
        words = torch.cat(
            [torch.nn.functional.pad(words, (longest - words.shape[1], 0), value=_ANYTHING) for words in groups]
        )
        of_word = self._repeat(rows, groups)
        at = self._tensor(positions)[of_word][:, None] + torch.arange(1 - longest, 0, device=self._device)
        before = self._history[self._tensor(slots)[of_word][:, None], at.clamp(min=0)]
        forbid_words(x, of_word, words, before.where(at >= 0, _NOTHING), self._vocab_size)

    def _forbid_ends(self, x: Tensor, states: list[_Slot], positions: list[int]) -> None:
        found = [
            (row, state.ends)
            for row, (state, position) in enumerate(zip(states, positions, strict=True))
            if state.ends is not None and position - state.num_prompt_tokens < state.config.min_tokens
        ]
        if found:
            rows, ids = zip(*found, strict=True)
            forbid(x, self._repeat(rows, ids), torch.cat(ids))

    def _apply_masks(self, x: Tensor, states: list[_Slot], slots: list[int]) -> dict[int, FerrumError]:
        if self._masks_written is not None:
            self._masks_written.result()
            self._masks_written = None
        if any(state.matcher is not None or state.allowed is not None for state in states):
            allow_only(x, self._masks[slots].to(self._device), self._table)
        return {row: state.error for row, state in enumerate(states) if state.error is not None}

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _repeat(self, rows: Sequence[int], groups: Sequence[Tensor]) -> Tensor:
        """Each row as often as its group has entries."""
        return self._tensor([row for row, group in zip(rows, groups, strict=True) for _ in range(len(group))])


def _run(name: str, processor: LogitsProcessor[Tensor], token_ids: list[TokenId], logits: Tensor) -> Tensor:
    """What a caller's processor returns; whatever it raises or returns wrongly is its own request's fault."""
    shape = logits.shape
    try:
        result = processor.apply(token_ids, logits)
    except BaseException as error:
        raise RequestValidationError(f"{name} raised {error!r}") from error
    if not isinstance(result, Tensor) or result.shape != shape:
        found = f"one of shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise RequestValidationError(f"{name} must return a tensor of shape {list(shape)}, it returned {found}")
    if not result.is_floating_point() or bool((result.isnan() | (result == math.inf)).any()):
        raise RequestValidationError(f"{name} must return floats, each a finite one or -inf")
    return result
