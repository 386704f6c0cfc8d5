"""What an engine would make of a workload: the real scheduler and pool in virtual time, over an executor that computes
nothing and takes as long as the costs say."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from ferrum_rt.interfaces.config import EngineConfig, SchedulerConfig
from ferrum_rt.interfaces.errors import ConfigError, FerrumError
from ferrum_rt.interfaces.model_executor import DecodeOutput, PrefillOutput, StepOutput
from ferrum_rt.interfaces.sampler import SampledToken, SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import Arrival, ClientId, FinishReason, RequestId, TokenId
from ferrum_rt.runtime.scheduling.admission import AdmissionPolicy
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.simulation.engine import SimulatedEngine, StepCosts
from ferrum_rt.runtime.simulation.reports import (
    CapacityReport,
    ClientReport,
    EngineSize,
    Objectives,
    Percentiles,
    Result,
    Series,
    Timeline,
    curve,
)


@dataclass(slots=True)
class Life:
    """One request's. Moments are in seconds; NaN is never."""

    arrival: Arrival
    first_token_at: float = math.nan
    last_token_at: float = math.nan
    num_tokens: int = 0
    is_done: bool = False
    """It got all its tokens: neither refused nor cut short by its deadline."""
    gaps: "array[float]" = field(default_factory=lambda: array("d"))

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.arrival.arrival_s

    def attains(self, objectives: Objectives) -> bool:
        """A request that was refused or cut short attains nothing. Its inter-token latency is the mean of its gaps."""
        if not self.is_done or self.ttft_s > objectives.ttft_s:
            return False
        mean = (self.last_token_at - self.first_token_at) / max(1, self.num_tokens - 1)
        return mean <= objectives.itl_s


def simulate_capacity(
    arrivals: Sequence[Arrival],
    config: EngineConfig,
    costs: StepCosts,
    objectives: Objectives,
    *,
    shared_prefix: int = 0,
) -> Result:
    """Run the requests to their ends. The first ``shared_prefix`` tokens of all prompts of a client are the same. Where the
    configuration does not say it, a sequence may be as long as the longest request, and there are pages for as many of
    those as there are slots. Raises ConfigError for pages that hold no sequence of that length."""
    longest = max(arrival.prompt_tokens + arrival.output_tokens for arrival in arrivals)
    block_size, num_slots = config.kv_cache.block_size, config.scheduler.max_running_requests
    max_model_len = config.model.max_model_len or longest
    size = EngineSize(
        slots=num_slots,
        pages=config.kv_cache.num_pages or num_slots * -(-max_model_len // block_size),
        block_size=block_size,
        max_batched_tokens=config.batching.max_batched_tokens,
        max_model_len=max_model_len,
    )
    if size.pages * block_size < max_model_len and config.model.max_model_len is not None:
        raise ConfigError(f"kv_cache.num_pages: {size.pages} pages of {block_size} tokens hold no {max_model_len} tokens")
    cache = PagedKvCache(size.pages, block_size, prefix_caching=config.kv_cache.prefix_caching)
    scheduler = UnifiedScheduler(cache, num_slots=num_slots, max_model_len=max_model_len, config=config.scheduler)
    world = PlannedWorld(scheduler, config.scheduler, arrivals, shared_prefix)
    engine = SimulatedEngine(
        scheduler,
        world,
        lambda step: costs.step_s(StepWork.of(step.batch), step.batch.num_rounds),
        max_batched_tokens=size.max_batched_tokens,
    )
    world.engine = engine
    timeline = Timeline()
    while engine.turn():
        timeline.add(engine.now, scheduler.statistics())
    cache.verify()
    return Result(
        report=_report(world, engine, scheduler, timeline, size, objectives),
        series=Series(
            timeline=timeline,
            ttft_s=curve(life.ttft_s for life in world.lives if life.num_tokens),
            itl_s=curve(gap for life in world.lives for gap in life.gaps),
        ),
    )


class PlannedWorld:
    """Callers who send what was planned, and an executor that computes nothing: a World."""

    engine: SimulatedEngine

    def __init__(
        self, scheduler: UnifiedScheduler, config: SchedulerConfig, arrivals: Sequence[Arrival], shared_prefix: int
    ) -> None:
        self.lives = [Life(arrival) for arrival in arrivals]
        self.num_refused = 0
        self._scheduler, self._config, self._shared_prefix = scheduler, config, shared_prefix
        self._admission = AdmissionPolicy(config, scheduler.estimated_wait_s)
        clients = dict.fromkeys(arrival.client for arrival in arrivals)
        self._client_numbers = {client: number for number, client in enumerate(clients)}
        self._next = 0
        self._active: dict[RequestId, Life] = {}

    def pause(self, until: float) -> None:
        while self._next < len(self.lives) and self.lives[self._next].arrival.arrival_s <= until:
            try:
                self._submit(self._next)
            except FerrumError:  # it fits in no engine of this size, or there is too much, or too much of its client's
                self.num_refused += 1
            self._next += 1

    def next_event(self) -> float | None:
        return self.lives[self._next].arrival.arrival_s if self._next < len(self.lives) else None

    def execute(self, plan: BatchPlan) -> StepOutput:
        batch = plan.step.batch
        return StepOutput(
            [_DECODED] * len(batch.decodes), [_SAMPLED if item.sample else _WRITTEN for item in batch.prefills]
        )

    def take(self, updates: list[SequenceUpdate]) -> None:
        now = self.engine.now
        for update in updates:
            life = self._active[update.request_id]
            for _ in update.token_ids:
                if life.num_tokens:
                    life.gaps.append(now - life.last_token_at)
                else:
                    life.first_token_at = now
                life.last_token_at = now
                life.num_tokens += 1
            if update.finish_reason is not None or update.error is not None:
                life.is_done = update.finish_reason is FinishReason.LENGTH
                del self._active[update.request_id]
                self._admission.leave(life.arrival.client)

    def _submit(self, number: int) -> None:
        life = self.lives[number]
        arrival = life.arrival
        shared = min(self._shared_prefix, arrival.prompt_tokens)
        own = arrival.prompt_tokens - shared
        request = SequenceRequest(
            request_id=RequestId(str(number)),
            # Even numbers are the clients', odd ones the requests'.
            token_ids=[TokenId(2 * self._client_numbers[arrival.client])] * shared + [TokenId(2 * number + 1)] * own,
            max_tokens=arrival.output_tokens,
            sampling=_SAMPLING,
            priority=self._config.policy(arrival.client).allowed(arrival.priority),
            deadline=None if arrival.deadline_s is None else arrival.arrival_s + arrival.deadline_s,
            client_id=arrival.client,
        )
        self._admission.admit(arrival.client, num_queued=0)
        try:
            self._scheduler.submit(request)
        except FerrumError:
            self._admission.leave(arrival.client)
            raise
        self._active[request.request_id] = life


def _report(
    world: PlannedWorld,
    engine: SimulatedEngine,
    scheduler: UnifiedScheduler,
    timeline: Timeline,
    size: EngineSize,
    objectives: Objectives,
) -> CapacityReport:
    lives, stats, seconds = world.lives, scheduler.statistics(), engine.now
    finished = sum(life.is_done for life in lives)
    num_tokens = sum(life.num_tokens for life in lives)
    by_client: dict[ClientId, list[Life]] = {}
    for life in lives:
        by_client.setdefault(life.arrival.client, []).append(life)
    return CapacityReport(
        engine=size,
        requests=len(lives),
        finished=finished,
        refused=world.num_refused,
        late=len(lives) - finished - world.num_refused,
        seconds=seconds,
        steps=engine.num_steps,
        busy=engine.busy_s / seconds if seconds else 0.0,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        output_tokens=num_tokens,
        output_tokens_per_s=num_tokens / seconds if seconds else 0.0,
        preemptions=stats.preemptions,
        waiting=timeline.level("waiting"),
        running=timeline.level("running"),
        pages=timeline.level("pages"),
        objectives=objectives,
        total=_client_report("all", lives, num_tokens, objectives),
        clients=[_client_report(client, known, num_tokens, objectives) for client, known in sorted(by_client.items())],
    )


def _client_report(name: str, lives: Sequence[Life], num_tokens: int, objectives: Objectives) -> ClientReport:
    own = sum(life.num_tokens for life in lives)
    return ClientReport(
        client=ClientId(name),
        requests=len(lives),
        finished=sum(life.is_done for life in lives),
        output_tokens=own,
        share=own / num_tokens if num_tokens else 0.0,
        ttft_s=Percentiles.of(life.ttft_s for life in lives if life.num_tokens),
        itl_s=Percentiles.of(gap for life in lives for gap in life.gaps),
        attainment=sum(life.attains(objectives) for life in lives) / len(lives),
    )


_SAMPLING = SamplingConfig()
_DECODED = DecodeOutput(SampledToken(TokenId(0)))
_SAMPLED, _WRITTEN = PrefillOutput(SampledToken(TokenId(0))), PrefillOutput(None)
