"""The engine loop: plan, launch, commit the step before, emit."""

import time
from concurrent.futures import Future
from typing import Protocol

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectSendStream

from ferrum_rt.interfaces.errors import BackendError, EngineFailed, as_ferrum_error
from ferrum_rt.interfaces.model_executor import ModelExecutor, StepOutput
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, Scheduler, SequenceUpdate
from ferrum_rt.runtime.threads.worker import Job, Worker

_RETRY_S = 0.01
# Rounds of decodes in one step take about so many times as long as the loop takes to come back to us, within bounds: new
# requests wait for them, and where they are too short a busy host leaves the executor without work.
_TIMES_LATE = 8
_LEAST_ROUNDS_S, _MOST_ROUNDS_S = 0.004, 0.02
_FORGET = 0.95


class EngineCounters(msgspec.Struct):
    """Since the start, in seconds where not counts."""

    steps: int = 0
    step_s: float = 0.0
    host_s: float = 0.0


class StepListener(Protocol):
    """Told on the event loop."""

    def launched(self, plan: BatchPlan) -> None:
        """A step is on its way."""
        ...

    def landed(self, plan: BatchPlan, *, step_s: float, ended: float) -> None:
        """It took ``step_s`` seconds and ended at this time of time.perf_counter's; its requests go on."""
        ...


class _Launched(msgspec.Struct):
    """A step on its way; ``step_s`` is how long it took, and ``ended`` when that was, once its job is done."""

    plan: BatchPlan
    job: Job[StepOutput] | None = None
    step_s: float = 0.0
    ended: float = 0.0

    @property
    def has_ended(self) -> bool:
        return self.job is not None and self.job.is_settled


class EngineLoop:
    """Runs one step ahead: step N+1 is planned and launched before N is committed. ``updates`` takes what each step
    brought; ``steps`` hears of each that is launched, and of each that has landed."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: ModelExecutor,
        worker: Worker,
        updates: MemoryObjectSendStream[list[SequenceUpdate]],
        *,
        max_batched_tokens: int,
        steps: StepListener,
    ) -> None:
        self.counters = EngineCounters()
        self._scheduler, self._executor, self._worker = scheduler, executor, worker
        self._updates = updates
        self._max_batched_tokens = max_batched_tokens
        self._steps = steps
        self._work = anyio.Event()
        self._last_end = 0.0
        self._late_s = 0.0  # that the loop came back to a step that had ended: the most, of late

    def notify(self) -> None:
        """The scheduler has something new to look at."""
        self._work.set()

    async def run(self) -> None:
        """Until cancelled."""
        in_flight: _Launched | None = None
        while True:
            if self._is_one_overdue():
                if in_flight is not None and in_flight.has_ended:
                    # Computed while the host kept us from looking: it counts before the deadline is judged.
                    await self._land(in_flight)
                    in_flight = None
                await self._emit(self._scheduler.expire(time.monotonic()))
            launched = self._launch()
            if in_flight is not None:
                await self._land(in_flight)
            elif launched is None:
                await self._wait_for_work()
            in_flight = launched

    def _is_one_overdue(self) -> bool:
        deadline = self._scheduler.next_deadline()
        return deadline is not None and deadline <= time.monotonic()

    def _launch(self) -> _Launched | None:
        began = time.perf_counter()
        rounds_s = min(_MOST_ROUNDS_S, max(_LEAST_ROUNDS_S, _TIMES_LATE * self._late_s))
        hint = BatchHint(now=time.monotonic(), max_tokens=self._max_batched_tokens, rounds_s=rounds_s)
        plan = self._scheduler.plan(hint)
        if plan is None:
            return None
        launched = _Launched(plan)
        launched.job = self._worker.submit(lambda: self._execute(launched))
        self._steps.launched(plan)
        self.counters.host_s += time.perf_counter() - began
        return launched

    def _execute(self, launched: _Launched) -> Future[StepOutput]:
        """In the worker thread."""
        began = time.perf_counter()
        output = self._executor.execute(launched.plan.step)
        output.add_done_callback(lambda _: self._count(launched, began))
        return output

    def _count(self, launched: _Launched, began: float) -> None:
        """A step takes from where the one before it ended, if that was after its own beginning."""
        now = launched.ended = time.perf_counter()
        launched.step_s = now - max(began, self._last_end)
        self.counters.step_s += launched.step_s
        self._last_end = now

    async def _land(self, launched: _Launched) -> None:
        assert launched.job is not None  # it was launched
        try:
            output = await launched.job.wait()
        except EngineFailed:
            raise
        except Exception as error:  # whatever a kernel raises ends the requests of its step, not the engine
            failure = as_ferrum_error(BackendError, "the executor failed in this request's step", error)
            updates = self._scheduler.fail(launched.plan, failure)
        else:
            began = time.perf_counter()
            self._late_s = max(began - launched.ended, _FORGET * self._late_s)
            updates = self._scheduler.commit(launched.plan, output, launched.step_s)
            self._steps.landed(launched.plan, step_s=launched.step_s, ended=launched.ended)
            self.counters.host_s += time.perf_counter() - began
        self.counters.steps += 1
        await self._emit(updates)

    async def _emit(self, updates: list[SequenceUpdate]) -> None:
        if updates:
            await self._updates.send(updates)

    async def _wait_for_work(self) -> None:
        deadline = self._scheduler.next_deadline()
        limit = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self._scheduler.statistics().waiting:  # refused a page although nobody runs: no end will wake us
            limit = _RETRY_S if limit is None else min(limit, _RETRY_S)
        with anyio.move_on_after(limit):
            await self._work.wait()
        self._work = anyio.Event()
