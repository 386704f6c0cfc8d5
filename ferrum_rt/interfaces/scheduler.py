"""Choosing what the next step computes."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig, TokenScores
from ferrum_rt.interfaces.types import (
    BatchId,
    ClientId,
    FinishReason,
    Priority,
    RequestId,
    SchedulerStats,
    SessionId,
    TokenId,
)


class SequenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenized request, ready to be scheduled: ``num_samples`` sequences that share their prompt. ``submitted_at`` and
    ``deadline`` are on the clock that BatchHint's ``now`` is read from. ``prompt_logprobs`` asks for the scores of the
    prompt's tokens. What a request of a session (of its client's) computes stays with the session when it ends well."""

    request_id: RequestId
    token_ids: list[TokenId]
    max_tokens: int
    sampling: SamplingConfig
    eos_token_ids: frozenset[TokenId] = frozenset()
    stop_token_ids: frozenset[TokenId] = frozenset()
    priority: Priority = Priority.NORMAL
    client_id: ClientId = ClientId("default")
    submitted_at: float = 0.0
    deadline: float | None = None
    salt: bytes = b""
    num_samples: int = 1
    prompt_logprobs: int | None = None
    session_id: SessionId | None = None


class SavedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it stood: what each of its samples that had not ended had generated, by the sample's index. Times are
    seconds from when the state was saved: negative is before."""

    request_id: RequestId
    token_ids: list[TokenId]
    outputs: dict[int, list[TokenId]]
    max_tokens: int
    eos_token_ids: frozenset[TokenId]
    stop_token_ids: frozenset[TokenId]
    num_samples: int
    priority: Priority
    client_id: ClientId
    session_id: SessionId | None
    salt: bytes
    submitted_s: float
    deadline_s: float | None
    is_parked: bool


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler had under way, in the order in which requests came, and what clients had been served, by priority.
    Encode it as JSON with ``msgspec.json``."""

    requests: list[SavedRequest]
    served: dict[str, dict[ClientId, float]]


class BatchHint(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine loop tells the scheduler about the coming step: the time, a bound on its tokens, and how many seconds
    rounds of decodes may take in it."""

    now: float
    max_tokens: int
    rounds_s: float = 0.0


class BatchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A step to run. The scheduler wants it back with the output, in the order of planning. ``request_ids`` are those of the
    step's inputs, decodes first; the ``preempted`` have lost their last slot since the plan before."""

    batch_id: BatchId
    step: StepInput
    request_ids: list[RequestId]
    preempted: list[RequestId] = []


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

    def end_well(self, request_id: RequestId, index: int) -> bool:
        """As ``cancel``, of a sample whose output is complete: what it computed may stay with its session."""
        ...

    def park(self, request_id: RequestId) -> None:
        """Leave a request out of the coming steps; its pages stay unless others need them."""
        ...

    def unpark(self, request_id: RequestId) -> bool:
        """Let a parked request go on; False if it must wait, for its slot and pages are others' by now."""
        ...

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        """The next step, or None when there is nothing to compute."""
        ...

    def commit(self, plan: BatchPlan, output: StepOutput, step_s: float | None = None) -> list[SequenceUpdate]:
        """Take over what a step computed, and how long it took, if that is known; returns what is new for each request."""
        ...

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        """A step could not be run. Its requests are run again in smaller and smaller parts, so that only the one ends that
        cannot be run by itself either."""
        ...

    def expire(self, now: float) -> list[SequenceUpdate]:
        """End the requests whose deadline has passed, and the sessions that nobody has used for their time."""
        ...

    def export_state(self, now: float) -> SavedState:
        """What is under way."""
        ...

    def import_state(self, state: SavedState, now: float) -> None:
        """Take over what another scheduler had under way: it is computed again, and goes on greedily."""
        ...

    def next_deadline(self) -> float | None: ...
    def statistics(self) -> SchedulerStats: ...
