"""An executor whose K/V memory is a list of token ids: reading a page that is not one's own gives wrong tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from ferrum_rt.interfaces.model_executor import (
    DecodeOutput,
    PrefillInput,
    PrefillOutput,
    SlotAssignment,
    StepInput,
    StepOutput,
)
from ferrum_rt.interfaces.sampler import SampledToken, TokenScores
from ferrum_rt.interfaces.types import TokenId

VOCABULARY = 50


def next_token(tokens: Sequence[int], sample: int = 0) -> TokenId:
    """The naive model: what follows depends on every token before, on their order, and on the sample."""
    return TokenId((_state(tokens) + 13 * sample) % VOCABULARY)


def score(tokens: Sequence[int]) -> TokenScores:
    """Of the last of ``tokens`` after those before it."""
    return TokenScores([TokenId(tokens[-1])], [float(_state(tokens))])


def _state(tokens: Sequence[int]) -> int:
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state


@dataclass(slots=True)
class _Slot:
    """``num_sampled`` stands for Mirostat's bound: it must survive preemption, and then equals the outputs so far."""

    assigned: SlotAssignment
    pages: list[int]
    num_sampled: float
    known: list[TokenId]
    last: TokenId | None = None


class PagedMemory:
    """Executes steps by the book: writes each token to its page, then reads the whole sequence back through the table."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        self._block_size = block_size
        self._memory: list[int | None] = [None] * (num_pages * block_size)
        self._slots: dict[int, _Slot] = {}

    def execute(self, step: StepInput) -> StepOutput:
        for assigned in step.assigned:
            history = assigned.history
            self._slots[assigned.slot] = _Slot(
                assigned, list(assigned.pages), history.mirostat_mu or 0.0, list(history.token_ids)
            )
        for appended in step.appended:
            pages = self._slots[appended.slot].pages
            assert appended.index == len(pages), "a page was appended out of order"
            pages.append(appended.page)
        for copied in step.copied:
            size = self._block_size
            content = self._memory[copied.source * size : (copied.source + 1) * size]
            self._memory[copied.target * size : (copied.target + 1) * size] = content
        slots = [item.slot for item in step.batch.decodes] + [item.slot for item in step.batch.prefills]
        assert len(slots) == len(set(slots)), "a sequence stands twice in one batch"
        rounds = step.batch.num_rounds
        assert rounds == 1 or not step.batch.prefills, "prefills go in one round"
        decodes = []
        for item in step.batch.decodes:
            places = range(item.position, item.position + rounds)
            first, *later = [self._decode(item.slot, position) for position in places]
            assert not later or self._slots[item.slot].assigned.sampling.is_plain
            decodes.append(DecodeOutput(first, later))
        return StepOutput(decodes, [self._prefill(item) for item in step.batch.prefills])

    def _decode(self, number: int, position: int) -> SampledToken:
        slot = self._slots[number]
        assert slot.last is not None, "a decode follows no sampled token"
        self._write(slot, [slot.last], position)
        return self._sample(slot, position + 1)

    def _prefill(self, item: PrefillInput) -> PrefillOutput:
        slot = self._slots[item.slot]
        self._write(slot, item.token_ids, item.start)
        end = item.start + len(item.token_ids)
        scores = []
        if item.num_scores is not None:
            known = self._read(slot, end) + ([] if item.token_after is None else [item.token_after])
            scores = [score(known[: position + 1]) for position in range(item.start + 1, len(known))]
        return PrefillOutput(self._sample(slot, end) if item.sample else None, scores)

    def _sample(self, slot: _Slot, length: int) -> SampledToken:
        known, sampling, history = self._read(slot, length), slot.assigned.sampling, slot.assigned.history
        assert slot.num_sampled == length - history.num_prompt_tokens, "what the sampler had learned was lost"
        assert slot.known == (known if sampling.uses_history else []), "the sampler was given another history"
        slot.last = next_token(known, sampling.sample_index)
        slot.num_sampled += 1
        if sampling.uses_history:
            slot.known.append(slot.last)
        return SampledToken(slot.last, mirostat_mu=slot.num_sampled)

    def _write(self, slot: _Slot, tokens: Sequence[TokenId], start: int) -> None:
        for position, token in enumerate(tokens, start=start):
            self._memory[self._at(slot, position)] = token

    def _read(self, slot: _Slot, length: int) -> list[TokenId]:
        tokens = [self._memory[self._at(slot, position)] for position in range(length)]
        return [TokenId(token) for token in tokens if token is not None]

    def _at(self, slot: _Slot, position: int) -> int:
        return slot.pages[position // self._block_size] * self._block_size + position % self._block_size
