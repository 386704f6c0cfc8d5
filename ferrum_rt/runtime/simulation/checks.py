"""The invariants that hold under any policy, checked while a simulation runs."""

import math
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from ferrum_rt.interfaces.errors import BackendError, DeadlineExceeded
from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.scheduler import Scheduler, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import FinishReason, RequestId, TokenId
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.simulation.policies import PolicyChecks
from ferrum_rt.runtime.simulation.violation import Invariant, Violation

# Steps between two checks of each page; the sums are checked after every one, and everything at the end.
FULL_CHECK_EVERY = 4


@dataclass(slots=True)
class _Output:
    """``tokens`` are what the sample gets alone, the first ``num_found`` of which have come."""

    tokens: list[TokenId]
    num_found: int = 0
    has_ended: bool = False


@dataclass(slots=True)
class _Live:
    """``has_failed``: it had a part in a step that failed, or one of its rows was NaN."""

    request: SequenceRequest
    outputs: list[_Output]
    has_failed: bool = False


class Checker:
    """Told of all that goes into a scheduler and comes out of it. Its methods raise Violation."""

    def __init__(self, scheduler: Scheduler, cache: PagedKvCache, policies: PolicyChecks, *, max_tokens: int) -> None:
        self.policies = policies
        self.step = 0
        self._scheduler, self._cache, self._max_tokens = scheduler, cache, max_tokens
        self._live: dict[RequestId, _Live] = {}
        self._owners: dict[int, RequestId] = {}  # of the slots
        self._sizes_at_start = sizes(scheduler, cache)

    @property
    def live(self) -> Items[RequestId]:
        """The requests that have not ended, in the order of their arrival."""
        return list(self._live)

    # -- what goes in -------------------------------------------------------------------------------------------------

    def submitted(self, request: SequenceRequest, expected: list[list[TokenId]]) -> None:
        """The scheduler has taken a request, whose samples alone would get ``expected``."""
        self._live[request.request_id] = _Live(request, [_Output(tokens) for tokens in expected])
        self.policies.began_to_wait(request, self.step)

    def parked(self, request_id: RequestId) -> None:
        self.policies.stopped_waiting(self._live[request_id].request)

    def unparked(self, request_id: RequestId) -> None:
        self.policies.began_to_wait(self._live[request_id].request, self.step)

    def cancelled(self, request_id: RequestId, index: int | None, was_here: bool) -> None:
        """The scheduler was told to drop a request, or one sample, and answered ``was_here``."""
        live = self._live.get(request_id)
        outputs = [] if live is None else [live.outputs[index]] if index is not None else live.outputs
        is_open = any(not output.has_ended for output in outputs)
        if was_here != is_open:
            raise Violation(Invariant.ONE_END, f"cancel said {was_here} of {request_id}, whose end is {not is_open}")
        for output in outputs:
            output.has_ended = True
        if live is not None:
            self._drop_if_ended(live)

    def speaking(self, request_id: RequestId) -> list[int]:
        """The request's samples that have tokens, and no end yet."""
        outputs = self._live[request_id].outputs
        return [index for index, output in enumerate(outputs) if output.num_found and not output.has_ended]

    # -- what comes out -----------------------------------------------------------------------------------------------

    def planned(self, step: StepInput) -> list[RequestId]:
        """Whose rows are in the step's batch."""
        batch = step.batch
        if not 0 < batch.num_tokens <= self._max_tokens:
            raise Violation(Invariant.STEP, f"{batch.num_tokens} tokens are planned, where 1 to {self._max_tokens} may be")
        for assigned in step.assigned:
            self._owners[assigned.slot] = assigned.request_id
        rows = []
        for slot in [item.slot for item in batch.decodes] + [item.slot for item in batch.prefills]:
            request_id = self._owners.get(slot)
            live = None if request_id is None else self._live.get(request_id)
            if request_id is None or live is None:
                raise Violation(Invariant.ONE_END, f"slot {slot} is planned for {request_id}, which has ended")
            self.policies.served(live.request, self.step)
            rows.append(request_id)
        return rows

    def failed(self, request_id: RequestId) -> None:
        """The request has a reason to fail."""
        if request_id in self._live:
            self._live[request_id].has_failed = True

    def take(self, update: SequenceUpdate) -> None:
        live = self._live.get(update.request_id)
        if live is None or (update.error is None and live.outputs[update.index].has_ended):
            raise Violation(Invariant.ONE_END, f"{_name(update)} gets an update after its end")
        self.policies.brought(self.step)
        self.policies.check_deadline(live.request, update)
        if update.error is not None:
            self._take_error(live, update)
            return
        output = live.outputs[update.index]
        for token_id in update.token_ids:
            self._take_token(update, output, token_id)
        if update.finish_reason is not None:
            output.has_ended = True
            self._check_reason(live, update, output)
            self._drop_if_ended(live)

    def _take_token(self, update: SequenceUpdate, output: _Output, token_id: TokenId) -> None:
        tokens, at = output.tokens, output.num_found
        if at >= len(tokens):
            raise Violation(Invariant.CONTIGUOUS, f"{_name(update)} goes on after its last token, number {at}")
        if token_id != tokens[at]:
            if token_id in tokens:  # all tokens of a seed differ, but for a few
                detail = f"{_name(update)} gets its token number {tokens.index(token_id)} as number {at}"
                raise Violation(Invariant.CONTIGUOUS, detail)
            detail = f"token number {at} of {_name(update)} is {token_id}, and {tokens[at]} alone"
            raise Violation(Invariant.SAME_OUTPUT, detail)
        output.num_found = at + 1

    def _take_error(self, live: _Live, update: SequenceUpdate) -> None:
        if isinstance(update.error, DeadlineExceeded):
            if any(output.num_found for output in live.outputs):
                raise Violation(Invariant.DEADLINE, f"{_name(update)} has tokens, and ends in DeadlineExceeded all the same")
        elif not (live.has_failed and isinstance(update.error, BackendError)):
            raise Violation(Invariant.ISOLATION, f"{_name(update)} fails for no fault: {update.error!r}")
        self._drop(live)

    def _check_reason(self, live: _Live, update: SequenceUpdate, output: _Output) -> None:
        if update.finish_reason is FinishReason.DEADLINE:
            return
        is_eos = output.tokens[-1] in live.request.eos_token_ids
        expected = FinishReason.EOS if is_eos else FinishReason.LENGTH
        if (output.num_found, update.finish_reason) != (len(output.tokens), expected):
            detail = f"{_name(update)} ends after {output.num_found} tokens by {update.finish_reason!r}; "
            detail += f"alone after {len(output.tokens)} by {expected!r}"
            raise Violation(Invariant.SAME_OUTPUT, detail)

    def _drop_if_ended(self, live: _Live) -> None:
        if all(output.has_ended for output in live.outputs):
            self._drop(live)

    def _drop(self, live: _Live) -> None:
        del self._live[live.request.request_id]
        self.policies.stopped_waiting(live.request)

    # -- what holds between -------------------------------------------------------------------------------------------

    def expired(self, now: float) -> None:
        """The scheduler has ended what its deadlines end."""
        for live in self._live.values():
            if (live.request.deadline or math.inf) <= now:
                detail = f"{live.request.request_id} is still here at {now}; its deadline was {live.request.deadline}"
                raise Violation(Invariant.DEADLINE, detail)

    def check(self, num_steps: int) -> None:
        """After each turn of the loop, when ``num_steps`` have landed."""
        self.step = num_steps
        if num_steps % FULL_CHECK_EVERY == 0:
            self._cache.verify()
        else:
            pages = self._cache.statistics().pages
            if pages.free + pages.active + pages.cached != pages.total:
                raise Violation(Invariant.LEDGER, f"the pages do not add up: {pages}")
        self.policies.check(self.step)

    def finish(self) -> None:
        """Nothing is left to do."""
        if self._live:
            raise Violation(Invariant.ONE_END, f"never ended: {', '.join(self._live)}")
        self._scheduler.next_deadline()  # lets go of those of requests that have ended
        self._cache.gc()
        self._cache.verify()
        for name, size in sizes(self._scheduler, self._cache).items():
            if size != self._sizes_at_start.get(name, 0):
                detail = f"{name} had {self._sizes_at_start.get(name, 0)} entries at the start, and has {size} at the end"
                raise Violation(Invariant.BOUNDED_MEMORY, detail)


def sizes(*roots: object) -> dict[str, int]:
    """How many entries the containers have that can be reached from ``roots``, by the attribute that holds them. Containers
    inside containers count into their attribute; those with a bound of their own (``deque(maxlen=)``) not at all."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    left: list[tuple[str, object]] = [(type(root).__name__, root) for root in roots]
    while left:
        name, value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | frozenset | tuple | deque):
            if not (isinstance(value, deque) and value.maxlen is not None):
                found[name] = found.get(name, 0) + len(value)
            items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            left.extend((name, item) for item in items if not isinstance(item, int | bytes | str | float))
        elif any(cls.__module__.startswith("ferrum_rt.runtime") for cls in type(value).__mro__):
            left.extend((f"{type(value).__name__}.{key}", item) for key, item in _attributes(value))
    return found


def _attributes(value: object) -> list[tuple[str, Any]]:
    names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return [(name, getattr(value, name)) for name in (*names, *getattr(value, "__dict__", ())) if hasattr(value, name)]


def _name(update: SequenceUpdate) -> str:
    return f"{update.request_id}[{update.index}]"
