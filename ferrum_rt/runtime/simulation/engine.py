"""The engine loop in virtual time: the order of EngineLoop's calls, without its threads and its awaits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.errors import BackendError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, Scheduler, SequenceUpdate
from ferrum_rt.runtime.scheduling.cost_model import StepWork


class StepCosts(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step takes, in seconds: ``base_s``, and more for each token computed, each sequence in the batch, and each
    token of context that a sequence attends to (its own included). The defaults are those of no machine in particular: 32
    sequences with 1,000 tokens each decode in about 12 ms."""

    base_s: float = 0.008
    token_s: float = 20e-6
    sequence_s: float = 30e-6
    context_s: float = 70e-9

    def step_s(self, work: StepWork, num_rounds: int = 1) -> float:
        """``work`` is that of each round."""
        tokens, sequences, context = work
        round_s = self.base_s + self.token_s * tokens + self.sequence_s * sequences + self.context_s * context
        return round_s * num_rounds


class World(Protocol):
    """Everything around the loop: callers, and the executor."""

    def pause(self, until: float) -> None:
        """Where the loop awaits. What callers do before ``until`` happens now."""
        ...

    def next_event(self) -> float | None:
        """When a caller will do something of its own accord; None if no more is to come."""
        ...

    def execute(self, plan: BatchPlan) -> StepOutput:
        """Run a step. Raises BackendError for one that fails as a whole."""
        ...

    def take(self, updates: list[SequenceUpdate]) -> None:
        """What a step brought."""
        ...


@dataclass(slots=True)
class _Launched:
    plan: BatchPlan
    result: StepOutput | BackendError
    seconds: float
    ends_at: float


class SimulatedEngine:
    """Runs one step ahead, as EngineLoop does. ``now`` is its clock, in seconds, and ``expired_at`` what that read when it
    last looked for deadlines; ``busy_s`` are the seconds in which a step ran. ``step_s`` says how long one takes."""

    def __init__(
        self, scheduler: Scheduler, world: World, step_s: Callable[[StepInput], float], *, max_batched_tokens: int
    ) -> None:
        self.now = self.expired_at = self.busy_s = 0.0
        self.num_steps = 0
        self._scheduler, self._world, self._step_s = scheduler, world, step_s
        self._max_batched_tokens = max_batched_tokens
        self._in_flight: _Launched | None = None

    def turn(self) -> bool:
        """One turn of the loop; False if there is nothing to do, and nothing that could bring any."""
        deadline = self._scheduler.next_deadline()
        if deadline is not None and deadline <= self.now:
            if self._in_flight is not None and self._in_flight.ends_at <= self.now:
                self._land(self._in_flight)
                self._in_flight = None
            self.expired_at = self.now
            self._emit(self._scheduler.expire(self.now))
        launched = self._launch()
        if self._in_flight is not None:
            self._land(self._in_flight)
        elif launched is None and not self._wait_for_work():
            return False
        self._in_flight = launched
        return True

    def _launch(self) -> _Launched | None:
        plan = self._scheduler.plan(BatchHint(now=self.now, max_tokens=self._max_batched_tokens, rounds_s=1.0))
        if plan is None:
            return None
        # Steps run in the order of their launch and touch nothing that others see, so this one may as well run now.
        result: StepOutput | BackendError
        try:
            result = self._world.execute(plan)
        except BackendError as error:
            result = error
        seconds = self._step_s(plan.step)
        self.busy_s += seconds
        begins_at = self.now if self._in_flight is None else max(self.now, self._in_flight.ends_at)
        return _Launched(plan, result, seconds, begins_at + seconds)

    def _land(self, launched: _Launched) -> None:
        self._world.pause(launched.ends_at)
        self.now = max(self.now, launched.ends_at)
        self.num_steps += 1
        if isinstance(launched.result, BackendError):
            self._emit(self._scheduler.fail(launched.plan, launched.result))
        else:
            self._emit(self._scheduler.commit(launched.plan, launched.result, launched.seconds))

    def _emit(self, updates: list[SequenceUpdate]) -> None:
        if updates:
            self._world.take(updates)
            self._world.pause(self.now)

    def _wait_for_work(self) -> bool:
        moments = [moment for moment in (self._world.next_event(), self._scheduler.next_deadline()) if moment is not None]
        if not moments:
            return False
        self.now = max(self.now, min(moments))
        self._world.pause(self.now)
        return True
