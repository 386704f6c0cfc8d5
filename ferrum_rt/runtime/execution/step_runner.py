"""The model's part of a step on the CPU: call by call, or as a program that was recorded when the model was loaded."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.kernels.batch import KvPages, TokenBatch
from ferrum_rt.kernels.cpu import CpuOps, NativeOps
from ferrum_rt.kernels.cpu.attention import AttentionPlan
from ferrum_rt.kernels.cpu.ops import Draws, Rounds
from ferrum_rt.kernels.cpu.program import BatchSizes, Program, Rows
from ferrum_rt.kernels.sampling import argmax
from ferrum_rt.runtime.execution.host_inputs import HostInputs
from ferrum_rt.runtime.models.decoder import Decoder

MAX_ROUNDS = 32


class StepLogits(NamedTuple):
    """``tokens`` are those drawn for each sampled row, None for one without a finite maximum; ``rows`` are the logits
    [num_slots, vocabulary], of which the first len(tokens) are this step's. Valid until the next step."""

    tokens: Sequence[TokenId | None]
    rows: Tensor


class StepRunner(Protocol):
    """Runs the decoder on what stands in its HostInputs, and draws tokens from what it can."""

    def assign(self, slot: int, sampling: SamplingConfig) -> bool:
        """How the slot's tokens are drawn from now on. False if this is beyond the runner: it gives the likeliest then."""
        ...

    def run(self, between: Callable[[Tensor], None] | None = None) -> StepLogits:
        """``between`` is called with the hidden states [N, hidden] before the logits are; it may use the decoder."""
        ...

    def run_rounds(self, num_rounds: int) -> Sequence[Sequence[TokenId | None]]:
        """Decodes alone, up to MAX_ROUNDS times, each with the token that the one before has drawn: these tokens, by
        round."""
        ...


class EagerRunner:
    """Call by call, for ops in torch; the likeliest tokens alone."""

    def __init__(self, decoder: Decoder, cache: list[KvPages], inputs: HostInputs) -> None:
        self._decoder, self._cache, self._inputs = decoder, cache, inputs

    def assign(self, slot: int, sampling: SamplingConfig) -> bool:
        return sampling.is_greedy

    def run(self, between: Callable[[Tensor], None] | None = None) -> StepLogits:
        batch = self._inputs.batch()
        hidden = self._decoder.forward(batch, self._decoder.plan_attention(batch), self._cache)
        if between is not None:
            between(hidden)
        logits = self._decoder.logits(hidden, batch.logit_rows)
        highest, ids = argmax(logits) if len(logits) else (logits.new_zeros(0), batch.logit_rows)
        return StepLogits(_sound(ids.tolist(), highest.isfinite().tolist()), logits)

    def run_rounds(self, num_rounds: int) -> Sequence[Sequence[TokenId | None]]:
        rounds = [self.run().tokens]
        while len(rounds) < num_rounds:
            self._inputs.advance(rounds[-1])
            rounds.append(self.run().tokens)
        return rounds


class _Recorded(NamedTuple):
    """``program`` is that of MAX_ROUNDS rounds; each is the layers' instructions, ``num_layers`` of them, then ``last`` (the
    logits, and what is drawn of them), then what makes the batch the next round's. It works on the tensors."""

    program: Program
    last: Program
    num_layers: int
    plan: AttentionPlan
    hidden: Tensor
    logits: Tensor
    highest: Tensor
    ids: Tensor
    draws: Draws
    found: Rounds


def _record(decoder: Decoder, ops: NativeOps, cache: list[KvPages], batch: TokenBatch) -> _Recorded:
    """Of the largest batch."""
    num_rows = len(batch.logit_rows)
    highest, ids = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    draws = Draws(torch.zeros((num_rows, 2), dtype=torch.int64), torch.zeros((num_rows, 4), dtype=torch.float64))
    found = Rounds(
        torch.empty((MAX_ROUNDS, num_rows), dtype=torch.int64),
        torch.empty((MAX_ROUNDS, num_rows)),
        torch.zeros(1, dtype=torch.int64),
    )
    with ops.record(Rows.TOKENS, len(batch.token_ids)) as layers:
        plan = decoder.plan_attention(batch)
        hidden = decoder.forward(batch, plan, cache)
    with ops.record(Rows.SAMPLED, num_rows) as last:
        logits = decoder.logits(hidden, batch.logit_rows)
        ops.argmax(highest, ids, logits)
        ops.draw(ids, highest, logits, batch.positions, batch.logit_rows, draws)
    with ops.record(Rows.SAMPLED, num_rows) as advance:
        ops.advance(batch, plan, found, highest, ids)
    program = Program([*layers, *last, *advance] * MAX_ROUNDS)
    return _Recorded(program, Program(last), len(layers), plan, hidden, logits, highest, ids, draws, found)


class RecordedRunner:
    """One native call a step, two where somebody looks in between."""

    def __init__(self, decoder: Decoder, ops: NativeOps, cache: list[KvPages], inputs: HostInputs) -> None:
        self._ops, self._inputs = ops, inputs
        self._addressed = decoder, cache  # the program knows their memory only by its addresses
        self._recorded = recorded = _record(decoder, ops, cache, inputs.largest_batch())
        # What of that is read and written here.
        self._spans, self._highest, self._ids = recorded.plan.spans.numpy(), recorded.highest.numpy(), recorded.ids.numpy()
        self._keys, self._cuts = (part.numpy() for part in recorded.draws)
        self._found_ids, self._found_highest, self._round = (part.numpy() for part in recorded.found)
        # The keys and cuts by slot.
        self._slot_keys, self._slot_cuts = np.zeros_like(self._keys), np.zeros_like(self._cuts)

    def assign(self, slot: int, sampling: SamplingConfig) -> bool:
        if not sampling.is_plain or sampling.is_greedy:
            self._slot_cuts[slot] = 0.0
            return sampling.is_greedy
        self._slot_keys[slot] = sampling.seed, sampling.sample_index
        self._slot_cuts[slot] = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        return True

    def run(self, between: Callable[[Tensor], None] | None = None) -> StepLogits:
        sizes, recorded = self._begin(), self._recorded
        if between is None:
            self._ops.run(recorded.program, sizes, recorded.num_layers + recorded.last.length)
        else:
            self._ops.run(recorded.program, sizes, recorded.num_layers)
            between(recorded.hidden[: sizes.tokens])
            self._ops.run(recorded.last, sizes)
        found = self._ids[: sizes.sampled].tolist()
        is_sound = np.isfinite(self._highest[: sizes.sampled]).tolist()
        return StepLogits(_sound(found, is_sound), recorded.logits)

    def run_rounds(self, num_rounds: int) -> Sequence[Sequence[TokenId | None]]:
        sizes = self._begin()
        self._round[0] = 0
        program = self._recorded.program
        self._ops.run(program, sizes, program.length // MAX_ROUNDS * num_rounds)
        ids = self._found_ids[:num_rounds, : sizes.sampled].tolist()
        is_sound = np.isfinite(self._found_highest[:num_rounds, : sizes.sampled]).tolist()
        return [_sound(*pair) for pair in zip(ids, is_sound, strict=True)]

    def _begin(self) -> BatchSizes:
        inputs = self._inputs
        self._spans[: len(inputs.spans)] = inputs.spans
        slots = inputs.sampled_slots
        self._keys[: len(slots)], self._cuts[: len(slots)] = self._slot_keys[slots], self._slot_cuts[slots]
        return BatchSizes(inputs.num_tokens, inputs.num_sampled, len(inputs.spans))


def build_runner(decoder: Decoder, ops: CpuOps, cache: list[KvPages], inputs: HostInputs) -> StepRunner:
    """The fastest that the ops allow."""
    if isinstance(ops, NativeOps):
        return RecordedRunner(decoder, ops, cache, inputs)
    return EagerRunner(decoder, cache, inputs)


def _sound(ids: list[TokenId], is_sound: list[bool]) -> list[TokenId | None]:
    return [token if sound else None for token, sound in zip(ids, is_sound, strict=True)]
