"""The scheduler without its policies: whoever came first is next, and nothing is learnt, counted or aged."""

from collections import OrderedDict
from collections.abc import Container
from typing import Any

from ferrum_rt.interfaces.types import ClientId
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.pace import Pace
from ferrum_rt.runtime.scheduling.roster import Roster
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.scheduling.sequence import Sequence
from ferrum_rt.runtime.scheduling.waiting import WaitingQueue


class _Queue(WaitingQueue):
    def __init__(self) -> None:
        self._queue: OrderedDict[Sequence, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, sequence: Sequence) -> None:
        self._queue[sequence] = None
        if sequence.num_starts:
            self._queue.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        del self._queue[sequence]

    def admit(self, sequence: Sequence) -> None:
        del self._queue[sequence]

    def first(self, without: Container[ClientId] = ()) -> Sequence | None:
        return next(iter(self._queue), None)

    def standing(self, sequence: Sequence) -> tuple[int, float, int]:
        return (0, 0.0, sequence.arrival)

    def serve(self, *args: Any, **kwargs: Any) -> None:
        pass

    def age(self) -> None:
        pass

    def forget(self) -> None:
        pass


class _Pace(Pace):
    def observe(self, work: StepWork, step_s: float) -> None:
        pass

    def ended(self, num_outputs: int) -> None:
        pass

    def prefill_budget(self, max_tokens: int, decodes: StepWork) -> int:
        return max_tokens - decodes.num_tokens


class FirstComeScheduler(UnifiedScheduler):
    """What is left when the policies are taken out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting = _Queue()
        self._roster = Roster(self._clients, self._waiting, self._residents, self.sessions, self.swapping)
        self._pace = _Pace(self._pace.config)

    def _make_way(self) -> None:
        pass
