"""Choosing what the next step computes."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig, TokenScores
from ferrum_rt.interfaces.types import BatchId, ClientId, FinishReason, Priority, RequestId, SchedulerStats, TokenId


class SequenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenized request, ready to be scheduled: ``num_samples`` sequences that share their prompt. ``deadline`` is on the
    clock that BatchHint's ``now`` is read from. ``prompt_logprobs`` asks for the scores of the prompt's tokens."""

    request_id: RequestId
    token_ids: list[TokenId]
    max_tokens: int
    sampling: SamplingConfig
    eos_token_ids: frozenset[TokenId] = frozenset()
    stop_token_ids: frozenset[TokenId] = frozenset()
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    salt: bytes = b""
    num_samples: int = 1
    prompt_logprobs: int | None = None
    client_id: ClientId = ClientId("default")


class BatchHint(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine loop tells the scheduler about the coming step: the time, and a bound on its tokens."""

    now: float
    max_tokens: int


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A step to run. The scheduler wants it back with the output, in the order of planning."""

    batch_id: BatchId
    step: StepInput


class SequenceUpdate(msgspec.Struct, kw_only=True, gc=False):
    """What became of sample ``index`` of a request: new tokens (with their ``scores`` if those were asked for), scores of
    the prompt's next tokens, and on its last update a reason. An ``error`` ends the request with all its samples."""

    request_id: RequestId
    token_ids: list[TokenId]
    index: int = 0
    scores: Sequence[TokenScores] = ()
    prompt_scores: Sequence[TokenScores] = ()
    finish_reason: FinishReason | None = None
    error: FerrumError | None = None
    num_cached_tokens: int = 0


class Scheduler(Protocol):
    """Synchronous and pure: it reads no clock, awaits nothing and touches no tensor.

    ``plan`` may be called once more before the plan before it is committed (one step ahead), never twice more.
    """

    def submit(self, request: SequenceRequest) -> None:
        """Queue a request. Raises RequestValidationError for one that could never fit, with the numbers."""
        ...

    def cancel(self, request_id: RequestId, index: int | None = None) -> bool:
        """Drop a request, or one of its samples, and free the pages at once; False if it is not here (any more)."""
        ...

    def park(self, request_id: RequestId) -> None:
        """Leave a request out of the coming steps; its pages stay unless others need them."""
        ...

    def unpark(self, request_id: RequestId) -> None: ...

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        """The next step, or None when there is nothing to compute."""
        ...

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[SequenceUpdate]:
        """Take over what a step computed; returns what is new for each request."""
        ...

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        """End every request of a step that could not be run."""
        ...

    def expire(self, now: float) -> list[SequenceUpdate]:
        """End the requests whose deadline has passed."""
        ...

    def next_deadline(self) -> float | None: ...
    def statistics(self) -> SchedulerStats: ...
