"""The scheduler and the page pool against a naive model, on random schedules."""

from collections import deque

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.model_executor import StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import FinishReason, Priority, RequestId, TokenId
from ferrum_rt.runtime.pages import PagedKvCache
from ferrum_rt.runtime.scheduler import UnifiedScheduler
from tests.fakes.memory import PagedMemory, next_token

NUM_PAGES, BLOCK_SIZE, NUM_SLOTS, MAX_LEN, BUDGET = 12, 4, 4, 40, 9
EOS = TokenId(7)


class Schedule:
    """One random schedule: what was asked, and what has come back so far."""

    def __init__(self, choices: bytes) -> None:
        self._choices = deque(choices)
        self.cache = PagedKvCache(NUM_PAGES, BLOCK_SIZE)
        self.scheduler = UnifiedScheduler(self.cache, num_pages=NUM_PAGES, num_slots=NUM_SLOTS, max_model_len=MAX_LEN)
        self.memory = PagedMemory(NUM_PAGES, BLOCK_SIZE)
        self.requests: dict[RequestId, SequenceRequest] = {}
        self.outputs: dict[RequestId, list[TokenId]] = {}
        self.reasons: dict[RequestId, FinishReason] = {}
        self.parked: set[RequestId] = set()
        self.in_flight: deque[tuple[BatchPlan, StepOutput]] = deque()

    def choose(self, below: int) -> int:
        return self._choices.popleft() % below if self._choices else 0

    @property
    def live(self) -> list[RequestId]:
        return [request_id for request_id in self.requests if request_id not in self.reasons]

    def run(self) -> None:
        while self._choices:
            match self.choose(8):
                case 0 | 1:
                    self.submit()
                case 2:
                    self.cancel()
                case 3:
                    self.park()
                case _:
                    self.step()
        for request_id in list(self.parked):
            self.unpark(request_id)
        bound = 40 * (len(self.live) + 1) * MAX_LEN
        while self.live or self.in_flight:
            self.step()
            bound -= 1
            assert bound > 0, "a sequence is never finished"

    def submit(self) -> None:
        # Few distinct tokens and starts, so that prefixes are often shared.
        length, start = 1 + self.choose(18), self.choose(3)
        request = SequenceRequest(
            request_id=RequestId(str(len(self.requests))),
            token_ids=[TokenId(start + position // 5) for position in range(length)],
            max_tokens=1 + self.choose(20),
            sampling=SamplingConfig(),
            eos_token_ids=frozenset({EOS}),
            priority=Priority(self.choose(4)),
            salt=bytes([self.choose(2)]),
        )
        self.scheduler.submit(request)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []

    def cancel(self) -> None:
        if self.live:
            request_id = self.live[self.choose(len(self.live))]
            assert self.scheduler.cancel(request_id)
            assert not self.scheduler.cancel(request_id)
            self.reasons[request_id] = FinishReason.CANCELLED
            self.parked.discard(request_id)
            self.cache.verify()

    def park(self) -> None:
        if not self.live:
            return
        request_id = self.live[self.choose(len(self.live))]
        if request_id in self.parked:
            self.unpark(request_id)
        else:
            self.scheduler.park(request_id)
            self.parked.add(request_id)

    def unpark(self, request_id: RequestId) -> None:
        self.scheduler.unpark(request_id)
        self.parked.discard(request_id)

    def step(self) -> None:
        """As the engine loop does: launch the next step, then commit the one before."""
        plan = self.scheduler.plan(BatchHint(now=0.0, max_tokens=BUDGET))
        if plan is not None:
            assert 0 < plan.step.batch.num_tokens <= BUDGET
            self.in_flight.append((plan, self.memory.execute(plan.step)))
        if len(self.in_flight) > (plan is not None):
            done, output = self.in_flight.popleft()
            for update in self.scheduler.commit(done, output):
                self.take(update)
        self.cache.verify()

    def take(self, update: SequenceUpdate) -> None:
        assert update.error is None
        assert update.request_id not in self.reasons, "an update came after the terminal one"
        self.outputs[update.request_id].extend(update.token_ids)
        if update.finish_reason is not None:
            self.reasons[update.request_id] = update.finish_reason
            self.parked.discard(update.request_id)


def naive(request: SequenceRequest) -> tuple[list[TokenId], FinishReason]:
    """One sequence on its own, with nothing shared, cached or preempted."""
    tokens = list(request.token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            return tokens[len(request.token_ids) :], FinishReason.EOS
    return tokens[len(request.token_ids) :], FinishReason.LENGTH


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=8, max_size=160))
def test_random_schedules_equal_the_naive_model(choices: bytes) -> None:
    """Whatever is submitted, cancelled and parked in whatever order: each request gets the naive model's tokens and one
    end, and the page ledger is exact after each step."""
    schedule = Schedule(choices)
    schedule.run()
    for request_id, request in schedule.requests.items():
        tokens, reason = naive(request)
        if schedule.reasons[request_id] is FinishReason.CANCELLED:
            assert schedule.outputs[request_id] == tokens[: len(schedule.outputs[request_id])]
        else:
            assert (schedule.outputs[request_id], schedule.reasons[request_id]) == (tokens, reason)
    pages = schedule.cache.statistics().pages
    assert pages.active == 0
    assert pages.free + pages.cached == NUM_PAGES
    stats = schedule.scheduler.statistics()
    assert (stats.running, stats.waiting, stats.parked) == (0, 0, 0)
