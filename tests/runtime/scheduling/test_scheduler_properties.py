"""The scheduler and the page pool against a naive model, on random schedules."""

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig, TokenScores
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import FinishReason, Mirostat, Priority, RequestId, TokenId
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from tests.fakes.memory import PagedMemory, next_token, score

NUM_PAGES, BLOCK_SIZE, NUM_SLOTS, MAX_LEN, BUDGET = 12, 4, 4, 40, 9
EOS = TokenId(7)

STEP_S = 0.001

Output = tuple[RequestId, int]


class Schedule:
    """One random schedule: what was asked, and what has come back so far."""

    def __init__(self, choices: bytes, max_rounds: int = 3) -> None:
        self._choices = deque(choices)
        self.cache = PagedKvCache(NUM_PAGES, BLOCK_SIZE)
        self.scheduler = UnifiedScheduler(self.cache, num_slots=NUM_SLOTS, max_model_len=MAX_LEN, max_rounds=max_rounds)
        for number in range(32):  # it knows what a step takes, and so plans rounds
            self.scheduler._pace.observe(StepWork(1 + number % 3, 1, number), STEP_S)
        self.memory = PagedMemory(NUM_PAGES, BLOCK_SIZE)
        self.requests: dict[RequestId, SequenceRequest] = {}
        self.outputs: dict[Output, list[TokenId]] = {}
        self.reasons: dict[Output, FinishReason] = {}
        self.scores: dict[RequestId, list[TokenScores]] = {}
        self.parked: set[RequestId] = set()
        self.in_flight: deque[tuple[BatchPlan, Callable[[], StepOutput]]] = deque()

    def choose(self, below: int) -> int:
        return self._choices.popleft() % below if self._choices else 0

    @property
    def live(self) -> list[RequestId]:
        open_outputs = [request_id for request_id, index in self.outputs if (request_id, index) not in self.reasons]
        return list(dict.fromkeys(open_outputs))

    def open_samples(self, request_id: RequestId) -> list[int]:
        samples = range(self.requests[request_id].num_samples)
        return [index for index in samples if (request_id, index) not in self.reasons]

    def run(self) -> None:
        while self._choices:
            match self.choose(9):
                case 0 | 1:
                    self.submit()
                case 2:
                    self.cancel()
                case 3:
                    self.park()
                case 4:
                    self.cancel_sample()
                case _:
                    self.step()
        for request_id in list(self.parked):
            self.unpark(request_id)
        bound = 40 * (len(self.outputs) + 1) * MAX_LEN
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
            sampling=self.sampling(),
            eos_token_ids=frozenset({EOS}),
            priority=Priority(self.choose(4)),
            salt=bytes([self.choose(2)]),
            num_samples=max(1, self.choose(5) - 1),
            prompt_logprobs=1 if self.choose(3) == 1 else None,
        )
        self.scheduler.submit(request)
        self.requests[request.request_id] = request
        self.scores[request.request_id] = []
        for index in range(request.num_samples):
            self.outputs[request.request_id, index] = []

    def sampling(self) -> SamplingConfig:
        match self.choose(4):
            case 0 | 1:
                return SamplingConfig()  # may go in rounds
            case 2:
                return SamplingConfig(mirostat=Mirostat())
            case _:
                return SamplingConfig(mirostat=Mirostat(), bad_words=((1,),))

    def cancel(self) -> None:
        if self.live:
            request_id = self.live[self.choose(len(self.live))]
            assert self.scheduler.cancel(request_id)
            assert not self.scheduler.cancel(request_id)
            for index in self.open_samples(request_id):
                self.reasons[request_id, index] = FinishReason.CANCELLED
            self.parked.discard(request_id)
            self.cache.verify()

    def cancel_sample(self) -> None:
        """As a stop string does: only of a sample that has output."""
        if self.live:
            request_id = self.live[self.choose(len(self.live))]
            index = self.open_samples(request_id)[0]
            if self.outputs[request_id, index]:
                assert self.scheduler.cancel(request_id, index)
                assert not self.scheduler.cancel(request_id, index)
                self.reasons[request_id, index] = FinishReason.CANCELLED
                if not self.open_samples(request_id):
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
        plan = self.scheduler.plan(BatchHint(now=0.0, max_tokens=BUDGET, rounds_s=1.0))
        if plan is not None:
            assert 0 < plan.step.batch.num_tokens <= BUDGET
            self.in_flight.append((plan, self.launch(plan.step)))
        if len(self.in_flight) > (plan is not None):
            done, output = self.in_flight.popleft()
            for update in self.scheduler.commit(done, output(), STEP_S):
                self.take(update)
        self.cache.verify()

    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        """Returns what waits for the step."""
        output = self.memory.execute(step)
        return lambda: output

    def take(self, update: SequenceUpdate) -> None:
        assert update.error is None
        output = update.request_id, update.index
        assert output not in self.reasons, "an update came after the terminal one"
        self.outputs[output].extend(update.token_ids)
        self.scores[update.request_id].extend(update.prompt_scores)
        if update.finish_reason is not None:
            self.reasons[output] = update.finish_reason
            if not self.open_samples(update.request_id):
                self.parked.discard(update.request_id)


def naive(request: SequenceRequest, index: int) -> tuple[list[TokenId], FinishReason]:
    """One sequence on its own, with nothing shared, cached or preempted."""
    tokens = list(request.token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens, index))
        if tokens[-1] == EOS:
            return tokens[len(request.token_ids) :], FinishReason.EOS
    return tokens[len(request.token_ids) :], FinishReason.LENGTH


def naive_scores(request: SequenceRequest) -> list[TokenScores]:
    if request.prompt_logprobs is None:
        return []
    return [score(request.token_ids[: position + 1]) for position in range(1, len(request.token_ids))]


@pytest.mark.proof
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=8, max_size=160))
def test_random_schedules_equal_the_naive_model(choices: bytes) -> None:
    """Whatever is submitted, cancelled and parked in whatever order: each sample gets the naive model's tokens and one
    end, each prompt its scores, and the page ledger is exact after each step."""
    schedule = Schedule(choices)
    schedule.run()
    for (request_id, index), found in schedule.outputs.items():
        request = schedule.requests[request_id]
        tokens, reason = naive(request, index)
        if schedule.reasons[request_id, index] is FinishReason.CANCELLED:
            assert found == tokens[: len(found)]
        else:
            assert (found, schedule.reasons[request_id, index]) == (tokens, reason)
        if found:
            assert schedule.scores[request_id] == naive_scores(request)
    pages = schedule.cache.statistics().pages
    assert pages.active == 0
    assert pages.free + pages.cached == NUM_PAGES
    stats = schedule.scheduler.statistics()
    assert (stats.running, stats.waiting, stats.parked) == (0, 0, 0)
