"""The scheduler and a FakeExecutor, stepped by hand in virtual time, one step ahead as the engine loop does."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from ferrum_rt.interfaces.config import EngineConfig, SchedulerConfig, build_config
from ferrum_rt.interfaces.errors import BackendError, FerrumError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import ClientId, FinishReason, Priority, RequestId, SessionId, TokenId
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.simulation.digests import expected_tokens
from tests.fakes.executor import FakeExecutor

PROMPT = [TokenId(65), TokenId(66), TokenId(67)]


class Schedule:
    """``fields`` are the scheduler's configuration; ``step_s`` says how long a step takes, ``fails`` whether the executor
    raises in it."""

    def __init__(
        self,
        *,
        num_slots: int = 4,
        num_pages: int = 256,
        block_size: int = 4,
        max_tokens: int = 64,
        prefix_caching: bool = True,
        num_host_pages: int = 0,
        step_s: Callable[[StepInput], float] = lambda step: 0.01,
        fails: Callable[[StepInput], bool] = lambda step: False,
        **fields: Any,
    ) -> None:
        engine: EngineConfig = build_config(
            None,
            None,
            {
                "scheduler": {"max_running_requests": num_slots, **fields},
                "kv_cache": {"block_size": block_size, "num_pages": num_pages},
            },
        )
        self.cache = PagedKvCache(num_pages, block_size, prefix_caching=prefix_caching)
        self.executor = FakeExecutor(engine)
        self.scheduler = UnifiedScheduler(
            self.cache,
            num_slots=num_slots,
            max_model_len=1024,
            config=engine.scheduler,
            num_host_pages=num_host_pages,
            page_bytes=1000,
        )
        self.config: SchedulerConfig = engine.scheduler
        self.now = 0.0
        self.tokens: dict[RequestId, list[TokenId]] = defaultdict(list)
        self.ends: dict[RequestId, FinishReason | FerrumError] = {}
        self.first_token_at: dict[RequestId, float] = {}
        self.served: Counter[ClientId] = Counter()
        self.requests: dict[RequestId, SequenceRequest] = {}
        self._max_tokens, self._step_s, self._fails = max_tokens, step_s, fails
        self._in_flight: deque[tuple[BatchPlan, StepOutput | None, float]] = deque()

    def submit(
        self,
        name: str,
        *,
        prompt: Sequence[int] = PROMPT,
        max_tokens: int = 8,
        client: str = "default",
        priority: Priority = Priority.NORMAL,
        deadline_s: float | None = None,
        num_samples: int = 1,
        session: str | None = None,
    ) -> RequestId:
        request = SequenceRequest(
            request_id=RequestId(name),
            token_ids=[TokenId(token) for token in prompt],
            max_tokens=max_tokens,
            sampling=SamplingConfig(),
            client_id=ClientId(client),
            priority=priority,
            submitted_at=self.now,
            deadline=None if deadline_s is None else self.now + deadline_s,
            num_samples=num_samples,
            session_id=None if session is None else SessionId(session),
        )
        self.requests[request.request_id] = request
        self.scheduler.submit(request)
        return request.request_id

    def step(self) -> bool:
        """Launch a step and land the one before; False if there was neither."""
        self._take(self.scheduler.expire(self.now))
        plan = self.scheduler.plan(BatchHint(now=self.now, max_tokens=self._max_tokens))
        landing = self._in_flight.popleft() if self._in_flight else None
        if plan is not None:
            output = self.executor.execute(plan.step).result()
            self._in_flight.append((plan, None if self._fails(plan.step) else output, self._step_s(plan.step)))
        if landing is not None:
            self._land(*landing)
        self.cache.verify()
        return plan is not None or landing is not None

    def run(self, limit: int = 10_000) -> int:
        """Until nothing is left to do; how many steps that took."""
        for number in range(limit):
            if not self.step():
                return number
        raise AssertionError(f"not at its end after {limit} steps")

    def num_waiting(self, client: str) -> int:
        found = self.scheduler.diagnostics().clients.get(ClientId(client))
        return 0 if found is None else found.num_waiting

    def check_tokens(self) -> None:
        """Whoever ended well has the tokens that it would have had alone."""
        for name, end in self.ends.items():
            if isinstance(end, FinishReason) and self.requests[name].num_samples == 1:
                assert self.tokens[name] == expected_tokens(self.requests[name].token_ids, len(self.tokens[name])), name

    def _land(self, plan: BatchPlan, output: StepOutput | None, step_s: float) -> None:
        self.now += step_s
        if output is None:
            self._take(self.scheduler.fail(plan, BackendError("told to fail")))
        else:
            self._take(self.scheduler.commit(plan, output, step_s))

    def _take(self, updates: Sequence[SequenceUpdate]) -> None:
        for update in updates:
            name = update.request_id
            self.tokens[name] += update.token_ids
            self.served[self.requests[name].client_id] += len(update.token_ids)
            if update.token_ids:
                self.first_token_at.setdefault(name, self.now)
            end = update.error or update.finish_reason
            if end is not None and (self.requests[name].num_samples == 1 or update.error):
                assert name not in self.ends, f"{name} has ended twice"
                self.ends[name] = end
