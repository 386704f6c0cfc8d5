"""Finding the request that makes a step fail: those of a failed step run again in halves, each until it has got further."""

from collections import deque
from dataclasses import dataclass

from ferrum_rt.runtime.scheduling.sequence import Sequence, SequenceState


@dataclass(slots=True)
class _Suspect:
    """``num_outputs`` it had before the step that failed."""

    sequence: Sequence
    num_outputs: int

    @property
    def is_cleared(self) -> bool:
        """It has sampled a token since, or is out of the way; a parked one is looked at when it goes on."""
        state = self.sequence.state
        is_away = state in (SequenceState.FINISHED, SequenceState.PARKED)
        return is_away or self.sequence.num_outputs > self.num_outputs


class Trials:
    """Groups of suspects, which run one after the other. A group gets a token for each of its members, or fails and is
    split; so every trial either finds somebody or gets somewhere."""

    def __init__(self) -> None:
        self._groups: deque[list[_Suspect]] = deque()

    def __bool__(self) -> bool:
        return bool(self.current())

    def current(self) -> list[Sequence]:
        """Those to run now: the first group's that are not cleared."""
        while self._groups:
            self._groups[0] = [suspect for suspect in self._groups[0] if not suspect.is_cleared]
            if self._groups[0]:
                return [suspect.sequence for suspect in self._groups[0]]
            self._groups.popleft()
        return []

    def split(self, requests: list[list[Sequence]]) -> None:
        """These requests, each with such of its samples, were in a step that failed."""
        members = {sequence for samples in requests for sequence in samples}
        for group in self._groups:
            group[:] = [suspect for suspect in group if suspect.sequence not in members]
        middle = len(requests) // 2
        for half in (requests[middle:], requests[:middle]):  # the first will stand in front
            self._groups.appendleft([_Suspect(sequence, sequence.num_outputs) for samples in half for sequence in samples])
