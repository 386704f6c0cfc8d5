"""An executor whose K/V memory is a list of token ids: reading a page that is not one's own gives wrong tokens."""

from collections.abc import Sequence

from ferrum_rt.interfaces.model_executor import DecodeOutput, PrefillOutput, StepInput, StepOutput
from ferrum_rt.interfaces.types import TokenId

VOCABULARY = 50


def next_token(tokens: Sequence[int]) -> TokenId:
    """The naive model: what follows depends on every token before, and on their order."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return TokenId(state % VOCABULARY)


class PagedMemory:
    """Executes steps by the book: writes each token to its page, then reads the whole sequence back through the table."""

    def __init__(self, num_pages: int, block_size: int) -> None:
        self._block_size = block_size
        self._memory: list[int | None] = [None] * (num_pages * block_size)
        self._tables: dict[int, list[int]] = {}
        self._last: dict[int, TokenId] = {}

    def execute(self, step: StepInput) -> StepOutput:
        for assigned in step.assigned:
            self._tables[assigned.slot] = list(assigned.pages)
            self._last.pop(assigned.slot, None)
        for appended in step.appended:
            table = self._tables[appended.slot]
            assert appended.index == len(table), "a page was appended out of order"
            table.append(appended.page)
        slots = [item.slot for item in step.batch.decodes] + [item.slot for item in step.batch.prefills]
        assert len(slots) == len(set(slots)), "a sequence stands twice in one batch"
        decodes = [
            DecodeOutput(self._run(item.slot, [self._last[item.slot]], item.position, sample=True))
            for item in step.batch.decodes
        ]
        prefills = [
            PrefillOutput(self._run(item.slot, item.token_ids, item.start, sample=item.sample))
            for item in step.batch.prefills
        ]
        return StepOutput(decodes, prefills)

    def _run(self, slot: int, tokens: Sequence[TokenId], start: int, *, sample: bool) -> TokenId | None:
        for position, token in enumerate(tokens, start=start):
            self._memory[self._at(slot, position)] = token
        if not sample:
            return None
        known = [self._memory[self._at(slot, position)] for position in range(start + len(tokens))]
        self._last[slot] = next_token([token for token in known if token is not None])
        return self._last[slot]

    def _at(self, slot: int, position: int) -> int:
        return self._tables[slot][position // self._block_size] * self._block_size + position % self._block_size
