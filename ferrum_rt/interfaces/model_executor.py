"""Running a model on a batch."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.sampler import SampledToken, SamplingConfig, SequenceHistory, TokenScores
from ferrum_rt.interfaces.types import MemoryUsage, ModelInfo, RequestId, TokenId


class PrefillInput(msgspec.Struct):
    """Known tokens of one sequence, to stand at positions ``start``, ``start + 1``, …; the last of them is sampled from
    if ``sample`` is set (a chunk in the middle of a prompt is not). With ``num_scores`` the tokens after the chunk's
    first are scored, and beside each the ``num_scores`` likeliest; so is ``token_after``, the prompt's next token."""

    slot: int
    token_ids: list[TokenId]
    start: int
    sample: bool
    num_scores: int | None = None
    token_after: TokenId | None = None


class DecodeInput(msgspec.Struct, gc=False):
    """The token that this slot sampled last, to stand at ``position``. Its value may still be on the device."""

    slot: int
    position: int


class UnifiedBatch(msgspec.Struct):
    """What one step computes: decodes and prefill chunks together, a sequence at most once. Where they are decodes
    alone, all plain (``SamplingConfig.is_plain``: greedy or drawn), they may go ``num_rounds`` times, each time at the next
    position and with the token just sampled."""

    decodes: list[DecodeInput]
    prefills: list[PrefillInput]
    num_rounds: int = 1

    @property
    def num_tokens(self) -> int:
        """Of each round."""
        return len(self.decodes) + sum(len(item.token_ids) for item in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class SlotAssignment(msgspec.Struct):
    """From this step on ``slot`` belongs to a sequence of this request, whose pages so far are ``pages``."""

    slot: int
    request_id: RequestId
    sampling: SamplingConfig
    pages: list[int]
    history: SequenceHistory = SequenceHistory()


class PageAppend(msgspec.Struct, gc=False):
    """From this step on ``page`` is number ``index`` in the slot's block table."""

    slot: int
    index: int
    page: int


class PageCopy(msgspec.Struct, gc=False):
    """Before this step's batch, ``target`` is to hold what ``source`` holds."""

    source: int
    target: int


class PageSwap(msgspec.Struct, gc=False):
    """A page on the device, and one on the host."""

    page: int
    host_page: int


class StepInput(msgspec.Struct):
    """One step: first what changed in the slots and the pages, then the batch to run. What pages hold is moved in this
    order: from ``swapped_out`` pages to the host's, then ``copied``, then to ``swapped_in`` pages from the host's. What is
    swapped out counts as done even if the step fails."""

    assigned: list[SlotAssignment]
    appended: list[PageAppend]
    copied: list[PageCopy]
    batch: UnifiedBatch
    swapped_out: list[PageSwap] = []
    swapped_in: list[PageSwap] = []


class DecodeOutput(msgspec.Struct, gc=False):
    """The token sampled after a decode, and those of ``later`` rounds."""

    sampled: SampledToken
    later: Sequence[SampledToken] = ()


class PrefillOutput(msgspec.Struct, gc=False):
    """The token sampled after a prefill chunk, None for a chunk that was not to be sampled; and the scores that
    were asked for."""

    sampled: SampledToken | None
    scores: Sequence[TokenScores] = ()


class StepOutput(msgspec.Struct):
    """Outputs in the order of the batch's inputs."""

    decodes: Sequence[DecodeOutput]
    prefills: Sequence[PrefillOutput]


class ModelExecutor(Protocol):
    """Runs steps in the order it is given them, all on one thread. The order is what makes it safe to give a page to
    somebody else while the step that last wrote it has not run yet. ``num_host_pages`` pages of the host's memory are there
    to swap pages to, each of ``page_bytes`` over all layers. Decodes can go up to ``max_rounds`` times in a step."""

    model_info: ModelInfo
    num_slots: int
    num_pages: int
    num_host_pages: int
    page_bytes: int
    max_rounds: int

    def execute(self, step: StepInput) -> Future[StepOutput]:
        """Run one step: to its end, or until a device has all it needs for it and the next may be given. Raises, at once or
        in the future, when the step as a whole failed, but has taken over what changed in the slots even then: the step
        behind it, planned already, still writes where the slots say. EngineFailed means that no step will ever run again."""
        ...

    def memory_usage(self) -> MemoryUsage: ...

    def close(self) -> None:
        """Give back threads and memory; called once, after the last step."""
        ...
