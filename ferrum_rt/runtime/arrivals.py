"""What requests an engine has had, without what was in them: a trace, for a simulation to replay."""

from collections import deque

import msgspec

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.types import Arrival
from ferrum_rt.runtime.generation import Generation

MAX_ARRIVALS = 10_000


class ArrivalLog:
    """Of the last ``MAX_ARRIVALS`` requests that ended, however they did; for they were work while they lasted. Those that
    were refused, or wrong, were none."""

    def __init__(self) -> None:
        self._ended: deque[Arrival] = deque(maxlen=MAX_ARRIVALS)  # when they came is by time.monotonic

    def add(self, generation: Generation) -> None:
        """It has ended."""
        if not generation.num_prompt_tokens or isinstance(generation.error, RequestValidationError):
            return
        request = generation.request
        self._ended.append(
            Arrival(
                arrival_s=generation.submitted_at,
                prompt_tokens=generation.num_prompt_tokens,
                output_tokens=max(1, generation.num_output_tokens),
                client=request.client_id,
                priority=request.priority,
                deadline_s=request.deadline_s,
            )
        )

    def export(self, last: int = MAX_ARRIVALS) -> list[Arrival]:
        """Of those that ended ``last``, in the order in which they came, the first at 0."""
        ended = list(self._ended)[-last:]
        ended.sort(key=lambda arrival: arrival.arrival_s)
        return [
            msgspec.structs.replace(arrival, arrival_s=round(arrival.arrival_s - ended[0].arrival_s, 6)) for arrival in ended
        ]
