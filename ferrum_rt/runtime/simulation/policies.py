"""The invariants that hang on the scheduler's policies, all in one place: what a policy promises, and what is held to it.

What holds under any policy is in ``checks``.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable

import msgspec

from ferrum_rt.interfaces.errors import DeadlineExceeded
from ferrum_rt.interfaces.scheduler import SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import ClientId, FinishReason, RequestId
from ferrum_rt.runtime.simulation.violation import Invariant, Violation


class Promises(msgspec.Struct, frozen=True, kw_only=True):
    """What the policies promise. ``max_wait_steps``: a request that is not parked has a part in one of that many steps, None
    for no bound. ``isolates``: of a step that fails only the request at fault ends. ``drops_early``: a request may end for
    its deadline before that has passed. ``max_lead``: what one client may be served more than another while both wait, in
    weighted tokens, None for no bound. ``max_barren_steps``: in so many steps something comes of them for somebody."""

    max_wait_steps: int | None = None
    isolates: bool = False
    drops_early: bool = False
    max_lead: float | None = None
    max_barren_steps: int | None = None


class PolicyChecks:
    """Told of each request's life, and of each step's part in it. ``service`` counts the tokens computed for each client;
    ``longest_wait`` is in steps."""

    def __init__(self, promises: Promises) -> None:
        self.service: Counter[ClientId] = Counter()
        self.longest_wait = 0
        self.promises = promises
        self._brought_at = 0
        self._served_at: OrderedDict[RequestId, int] = OrderedDict()  # who may wait, the longest first

    def began_to_wait(self, request: SequenceRequest, step: int) -> None:
        """Submitted, or no longer parked."""
        self._served_at[request.request_id] = step
        self._served_at.move_to_end(request.request_id)

    def stopped_waiting(self, request: SequenceRequest) -> None:
        """Ended, or parked."""
        self._served_at.pop(request.request_id, None)

    def brought(self, step: int) -> None:
        """Somebody got something of a step, be it an end."""
        self._brought_at = step

    def served(self, request: SequenceRequest, num_tokens: int, step: int) -> None:
        """``num_tokens`` of the request's are computed by a step, in one of its samples."""
        self.service[request.client_id] += num_tokens
        if request.request_id in self._served_at:
            self.longest_wait = max(self.longest_wait, step - self._served_at[request.request_id])
            self._served_at[request.request_id] = step
            self._served_at.move_to_end(request.request_id)

    def check_deadline(self, request: SequenceRequest, update: SequenceUpdate, now: float) -> None:
        """The update may say that the request ended for its deadline only if that has come."""
        if update.finish_reason is not FinishReason.DEADLINE and not isinstance(update.error, DeadlineExceeded):
            return
        if request.deadline is None or (now < request.deadline and not self.promises.drops_early):
            raise Violation(
                Invariant.DEADLINE, f"{request.request_id} ended at {now} for a deadline which is {request.deadline}"
            )

    def check_fair(self, counters: Iterable[float]) -> None:
        """What each of those was served that have requests waiting in one class."""
        served, bound = list(counters), self.promises.max_lead
        if bound is not None and served and max(served) - min(served) > bound:
            lead = max(served) - min(served)
            raise Violation(Invariant.FAIR, f"a client was served {lead} more than another, which may be {bound}")

    def check(self, step: int) -> None:
        """After each step."""
        barren, bound = step - self._brought_at, self.promises.max_barren_steps
        if bound is not None and barren > bound and self._served_at:
            raise Violation(Invariant.BOUNDED_WAIT, f"nothing has come of {barren} steps, which may be {bound}")
        bound = self.promises.max_wait_steps
        if bound is not None and self._served_at:
            request_id, since = next(iter(self._served_at.items()))
            if step - since > bound:
                raise Violation(
                    Invariant.BOUNDED_WAIT, f"{request_id} has had no part in {step - since} steps, which may be {bound}"
                )
