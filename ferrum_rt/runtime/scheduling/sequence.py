"""One sequence on its way through the scheduler."""

import enum
from dataclasses import dataclass, field

import msgspec

from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.sampler import SamplingConfig, SequenceHistory
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import Priority, TokenId


class SequenceState(enum.Enum):
    """Changed by ``Roster`` alone. A held one waits for the first sample of its request to compute their prompt. A parked
    sequence may hold a slot and pages, or have lost them to others."""

    HELD = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PARKED = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """``tokens`` are all that are known. Beyond them, ``num_pending`` are sampled by steps that are not
    committed yet. ``num_planned`` tokens have their K/V written once every planned step has run. ``prefill_length`` tokens
    were known when it got its slot, and so must be sent to the executor; it samples the later ones itself. Of the prompt,
    ``num_scored`` tokens after the first have been scored. ``priority`` is the request's, or a higher one for which it has
    waited. It got a slot ``num_starts`` times, and was in ``num_retries`` steps that failed.
    """

    request: SequenceRequest
    arrival: int
    index: int = 0
    tokens: list[TokenId] = field(init=False)
    priority: Priority = field(init=False)
    is_plain: bool = field(init=False)
    state: SequenceState = SequenceState.WAITING
    slot: int | None = None
    handle: KvCacheHandle | None = None
    num_planned: int = 0
    num_pending: int = 0
    num_starts: int = 0
    num_retries: int = 0
    num_cached_tokens: int = 0
    prefill_length: int = 0
    num_scored: int = 0
    mirostat_mu: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)
        self.priority = self.request.priority
        self.is_plain = self.request.sampling.is_plain

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts the most urgent first."""
        return (-self.priority, self.arrival)

    @property
    def sampling(self) -> SamplingConfig:
        sampling = self.request.sampling
        return msgspec.structs.replace(sampling, sample_index=self.index) if self.index else sampling

    @property
    def history(self) -> SequenceHistory:
        """What the sampler is to know when the sequence gets a slot."""
        uses_history = self.request.sampling.uses_history
        return SequenceHistory(
            token_ids=list(self.tokens) if uses_history else (),
            num_prompt_tokens=len(self.request.token_ids),
            mirostat_mu=self.mirostat_mu,
        )

    @property
    def wants_scores(self) -> bool:
        """Prompt tokens are still to be scored; the first sample does it for all."""
        request = self.request
        return request.prompt_logprobs is not None and self.index == 0 and self.num_scored < len(request.token_ids) - 1

    @property
    def length(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.request.token_ids)

    @property
    def num_unplanned(self) -> int:
        """Tokens that it may still get, beside those that are being sampled; for one of 0 a further step would be thrown
        away."""
        return self.request.max_tokens - self.num_outputs - self.num_pending

    @property
    def is_decoding(self) -> bool:
        """The one token to compute is the one its slot sampled last, which the executor still has."""
        return self.num_planned == self.length - 1 and self.num_planned >= self.prefill_length

    def start(self, slot: int, handle: KvCacheHandle) -> None:
        """Take a slot and pages; what the pages already hold need not be computed."""
        self.slot, self.handle = slot, handle
        self.num_starts += 1
        self.num_planned = handle.num_cached_tokens
        self.prefill_length = len(self.tokens)

    def stop(self) -> None:
        """Lose slot and pages: everything is to be computed again, unless the prefix cache still has it."""
        self.slot, self.handle = None, None
        self.num_planned = 0
