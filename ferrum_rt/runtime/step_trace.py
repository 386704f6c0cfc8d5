"""What steps do to requests, told to these; and spans of the steps themselves, in traces of their own that link to the
requests'. Not of every step: of so many a second as a picture can show, whatever a step takes."""

import logging
import math
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.scheduler import BatchPlan, Scheduler
from ferrum_rt.interfaces.types import RequestId
from ferrum_rt.runtime.generation import Generation

STEP_SPAN_EVERY_S = 0.1

_TRACER = trace.get_tracer(names.SCOPE)
_log = logging.getLogger("ferrum_rt")


class StepTrace:
    """For one engine, whose requests under way ``active`` are."""

    def __init__(self, active: Mapping[RequestId, Generation], scheduler: Scheduler) -> None:
        self._active, self._scheduler = active, scheduler
        self._recorded_at = -math.inf

    def launched(self, plan: BatchPlan) -> None:
        """A step is on its way."""
        if not (plan.preempted or plan.step.assigned or plan.step.batch.prefills):
            return
        now = time.monotonic()
        for request_id in plan.preempted:
            if (generation := self._active.get(request_id)) is not None:
                generation.trace.preempt(now)
        for assigned in plan.step.assigned:
            if (generation := self._active.get(assigned.request_id)) is not None:
                generation.started(now)
        batch = plan.step.batch
        for item, request_id in zip(batch.prefills, plan.request_ids[len(batch.decodes) :], strict=True):
            if (generation := self._active.get(request_id)) is not None:
                generation.trace.chunk(len(item.token_ids), item.start, now)

    def landed(self, plan: BatchPlan, *, step_s: float, ended: float) -> None:
        """It took ``step_s`` seconds and ended at this time of time.perf_counter's."""
        if ended - self._recorded_at < STEP_SPAN_EVERY_S:
            return
        self._recorded_at = ended
        try:
            self._record(plan, step_s, time.perf_counter() - ended)
        except Exception as fault:  # its class alone, for its message may quote anything
            _log.warning("a step's span could not be recorded: %s", type(fault).__name__)

    def _record(self, plan: BatchPlan, step_s: float, ago_s: float) -> None:
        end = time.time_ns() - int(ago_s * 1e9)
        generations = (self._active.get(request_id) for request_id in dict.fromkeys(plan.request_ids))
        links = [link for one in generations if one is not None and (link := one.trace.link) is not None]
        if not links:
            return  # nobody records
        # No parent, whatever span is current where the engine was opened.
        span = _TRACER.start_span(names.STEP, Context(), links=links, start_time=end - int(step_s * 1e9))
        if not span.is_recording():
            return
        batch, stats = plan.step.batch, self._scheduler.statistics()
        span.set_attributes(
            {
                names.STEP_DECODES: len(batch.decodes),
                names.STEP_PREFILLS: len(batch.prefills),
                names.STEP_PREFILL_TOKENS: sum(len(item.token_ids) for item in batch.prefills),
                names.STEP_ROUNDS: batch.num_rounds,
                names.STEP_RUNNING: stats.running,
                names.STEP_WAITING: stats.waiting,
                names.STEP_PARKED: stats.parked,
                names.STEP_PAGES_FREE: stats.pages.free,
                names.STEP_PAGES_ACTIVE: stats.pages.active,
                names.STEP_PAGES_CACHED: stats.pages.cached,
            }
        )
        span.end(end)
