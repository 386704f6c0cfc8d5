"""The invariants that hang on the scheduler's policies, all in one place.

What holds under any policy is in ``checks``.
"""

from collections import OrderedDict
from collections.abc import Iterable

from ferrum_rt.interfaces.errors import DeadlineExceeded
from ferrum_rt.interfaces.scheduler import SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import FinishReason, RequestId
from ferrum_rt.runtime.simulation.violation import Invariant, Violation

# Something comes of so many steps for somebody: a prompt takes 40 at most, and half a dozen of them may be computed to find
# which one fails.
MAX_BARREN_STEPS = 400


class PolicyChecks:
    """Told of each request's life, and of each step's part in it. ``max_lead`` is what one client may be served more than
    another while both wait, in weighted tokens. A request that is not parked has a part in one of ``max_wait_steps`` steps;
    None for no bound. ``longest_wait`` is in steps."""

    def __init__(self, *, max_lead: float, max_wait_steps: int | None = None) -> None:
        self.longest_wait = 0
        self._max_lead, self._max_wait_steps = max_lead, max_wait_steps
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

    def served(self, request: SequenceRequest, step: int) -> None:
        """Tokens of the request's are computed by a step."""
        if request.request_id in self._served_at:
            self.longest_wait = max(self.longest_wait, step - self._served_at[request.request_id])
            self._served_at[request.request_id] = step
            self._served_at.move_to_end(request.request_id)

    def check_deadline(self, request: SequenceRequest, update: SequenceUpdate) -> None:
        """The update may say that the request ended for its deadline only if it has one, which need not have come."""
        has_ended = update.finish_reason is FinishReason.DEADLINE or isinstance(update.error, DeadlineExceeded)
        if has_ended and request.deadline is None:
            raise Violation(Invariant.DEADLINE, f"{request.request_id} ended for a deadline, and has none")

    def check_fair(self, counters: Iterable[float]) -> None:
        """What each of those was served that have requests waiting in one class."""
        served = list(counters)
        lead = max(served) - min(served) if served else 0.0
        if lead > self._max_lead:
            raise Violation(Invariant.FAIR, f"a client was served {lead} more than another, which may be {self._max_lead}")

    def check(self, step: int) -> None:
        """After each step."""
        if not self._served_at:
            return
        barren = step - self._brought_at
        if barren > MAX_BARREN_STEPS:
            raise Violation(Invariant.BOUNDED_WAIT, f"nothing has come of {barren} steps, which may be {MAX_BARREN_STEPS}")
        request_id, since = next(iter(self._served_at.items()))
        waited, bound = step - since, self._max_wait_steps
        if bound is not None and waited > bound:
            raise Violation(Invariant.BOUNDED_WAIT, f"{request_id} has had no part in {waited} steps, which may be {bound}")
