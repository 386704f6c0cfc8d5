"""The simulation: what it finds, what it does not, and that it is the engine's loop that it simulates."""

import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from ferrum_rt.interfaces.errors import BackendError, FerrumError
from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.model_executor import (
    DecodeInput,
    PrefillInput,
    SlotAssignment,
    StepInput,
    StepOutput,
    UnifiedBatch,
)
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import FinishReason, RequestId, TokenId
from ferrum_rt.runtime import runtime
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.scheduling.sequence import Sequence
from ferrum_rt.runtime.scheduling.swapping import HostPages, Swapping
from ferrum_rt.runtime.simulation.checks import sizes
from ferrum_rt.runtime.simulation.digests import DigestMemory, WrongStep, expected_tokens
from ferrum_rt.runtime.simulation.engine import SimulatedEngine, StepCosts
from ferrum_rt.runtime.simulation.seeds import run_seed
from ferrum_rt.runtime.simulation.violation import Invariant, Violation
from tests.runtime.engines import fake_engine, until
from tests.runtime.simulation import planted_bugs

MAX_SEEDS = 1000


def first_violation(invariant: Invariant, **fields: Any) -> Violation:
    for seed in range(MAX_SEEDS):
        try:
            run_seed(seed, again=True, **fields)
        except Violation as violation:
            if violation.invariant is invariant:
                return violation
    raise AssertionError(f"{fields}: not found in {MAX_SEEDS} seeds")


@pytest.mark.parametrize(
    ("bug", "invariant"),
    [
        (planted_bugs.LostCancel, Invariant.ONE_END),
        (planted_bugs.PublishBeforeCommit, Invariant.SAME_OUTPUT),
        (planted_bugs.LeakedParked, Invariant.BOUNDED_MEMORY),
        (planted_bugs.SwallowedToken, Invariant.CONTIGUOUS),
        (planted_bugs.DeafToParkedDeadlines, Invariant.DEADLINE),
        (planted_bugs.WrongCulprit, Invariant.ISOLATION),
        (planted_bugs.OverBudget, Invariant.STEP),
        (planted_bugs.LongMemory, Invariant.BOUNDED_MEMORY),
        (planted_bugs.Moody, Invariant.SAME_LOG),
        (planted_bugs.UnknownName, Invariant.NO_CRASH),
        (planted_bugs.UnfairTie, Invariant.FAIR),
        (planted_bugs.BlamesEverybody, Invariant.ISOLATION),
        (planted_bugs.EndlessTrials, Invariant.BOUNDED_WAIT),
        (planted_bugs.KeepsWhatFailed, Invariant.SAME_OUTPUT),
        (planted_bugs.HostPageFreedTwice, Invariant.LEDGER),
        (planted_bugs.CopiedBeforeItArrives, Invariant.SAME_OUTPUT),
        (planted_bugs.HostPageFreedTooEarly, Invariant.SAME_OUTPUT),
        (planted_bugs.LastPageLeftBehind, Invariant.SAME_OUTPUT),
        (planted_bugs.HostPagesOutliveSessions, Invariant.BOUNDED_MEMORY),
    ],
)
def test_a_planted_bug_of_the_scheduler_is_found(bug: type[UnifiedScheduler], invariant: Invariant) -> None:
    """Within 1,000 seeds the bug violates the invariant that it is about."""
    first_violation(invariant, scheduler_type=bug)


@pytest.mark.parametrize(
    ("bug", "invariant"),
    [
        (planted_bugs.DoubleFree, Invariant.LEDGER),
        (planted_bugs.UnchainedDigests, Invariant.SAME_OUTPUT),
        (planted_bugs.NeverCopied, Invariant.SAME_OUTPUT),
    ],
)
def test_a_planted_bug_of_the_pool_is_found(bug: type[PagedKvCache], invariant: Invariant) -> None:
    """Within 1,000 seeds the bug violates the invariant that it is about."""
    first_violation(invariant, cache_type=bug)


def test_a_bound_on_waiting_is_held_to() -> None:
    """A promise that nobody waits, of a scheduler that makes them wait, is found to be broken."""
    first_violation(Invariant.BOUNDED_WAIT, max_wait_steps=1)


@pytest.mark.slow
def test_seeds_violate_nothing() -> None:
    """The scheduler and the pool as they are live 100 seeds without a violation, each twice with the same events."""
    for seed in range(100):
        run_seed(seed, again=True)


@pytest.mark.slow
def test_every_fault_happens() -> None:
    """Among a few seeds there are steps that fail, NaN rows, parked and cancelled requests, deadlines and clock jumps."""
    lines: list[str] = []

    for seed in range(40):
        run_seed(seed, say=lines.append)

    text = "\n".join(lines)
    for sign in (
        "fails  StepInput",
        "NaN",
        "\npark",
        "\nunpark",
        "\ncancel",
        "DeadlineExceeded",
        "'deadline'",
        "the clock jumps",
        "END_SESSION",
        "FORK_SESSION",
        "end, as by a stop string",
    ):
        assert sign in text, sign


@pytest.mark.slow
def test_sessions_are_swapped() -> None:
    """Among a few seeds sessions go to the host, come back, and make room there for others."""
    counts: Counter[str] = Counter()

    class Counting(Swapping):
        def keep(self, handle: KvCacheHandle) -> HostPages | None:
            kept = super().keep(handle)
            counts["kept"] += kept is not None
            return kept

        def read(self, sequence: Sequence, handle: KvCacheHandle, kept: HostPages, num_tokens: int) -> None:
            counts["brought back"] += 1
            super().read(sequence, handle, kept, num_tokens)

        def _make_room(self, num_pages: int) -> bool:
            num_before = len(self._kept)
            has_room = super()._make_room(num_pages)
            counts["made room"] += len(self._kept) < num_before
            return has_room

    class CountingScheduler(planted_bugs.WithParts):
        swapping_type = Counting

    for seed in range(60):
        run_seed(seed, scheduler_type=CountingScheduler)

    assert min(counts[what] for what in ("kept", "brought back", "made room")) > 3, counts


@pytest.mark.slow
def test_a_seed_is_the_same_in_every_process() -> None:
    """Nothing hangs on the order of sets of strings, which differs from process to process."""
    code = "from ferrum_rt.runtime.simulation.seeds import run_seed\nfor seed in range(30): print(run_seed(seed))"

    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }

    assert len(outputs) == 1


# -- the loop -------------------------------------------------------------------------------------------------------------


class Recorder(UnifiedScheduler):
    """Notes the calls of the loop: e(xpire), p(lan) or, without a batch, n(othing), c(ommit), f(ail)."""

    calls = ""

    def expire(self, now: float) -> list[SequenceUpdate]:
        self.calls += "e"
        return super().expire(now)

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        plan = super().plan(hint)
        self.calls += "n" if plan is None else "p"
        return plan

    def commit(self, plan: BatchPlan, output: StepOutput, step_s: float | None = None) -> list[SequenceUpdate]:
        self.calls += "c"
        return super().commit(plan, output, step_s)

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        self.calls += "f"
        return super().fail(plan, error)

    def busy_calls(self) -> str:
        """Without the turns in which the loop was idle, before and after."""
        return re.sub("^n*|n*$", "", self.calls)

    def is_idle(self) -> bool:
        """Every step that was planned has landed."""
        return self.calls.endswith("n") and self.calls.count("p") == self.calls.count("c") + self.calls.count("f")


class OneRequest:
    """A World with one request, submitted at once; step ``fail_at`` fails."""

    def __init__(self, scheduler: UnifiedScheduler, memory: DigestMemory, request: SequenceRequest, fail_at: int) -> None:
        scheduler.submit(request)
        self.memory, self.fail_at, self.num_steps = memory, fail_at, 0
        self.tokens: list[TokenId] = []

    def pause(self, until: float) -> None:
        pass

    def next_event(self) -> float | None:
        return None

    def execute(self, plan: BatchPlan) -> StepOutput:
        self.num_steps += 1
        output = self.memory.execute(plan.step)
        if self.num_steps == self.fail_at:
            raise BackendError("told to fail")
        return output

    def take(self, updates: list[SequenceUpdate]) -> None:
        self.tokens += [token for update in updates for token in update.token_ids]


PROMPT = [TokenId(token) for token in range(1, 20)]


def simulate_one(fail_at: int) -> tuple[Recorder, OneRequest, SimulatedEngine]:
    cache = PagedKvCache(64, 16)
    scheduler = Recorder(cache, num_slots=4, max_model_len=1024)
    request = SequenceRequest(request_id=RequestId("a"), token_ids=PROMPT, max_tokens=6, sampling=SamplingConfig())
    world = OneRequest(scheduler, DigestMemory(4, 64, 16), request, fail_at)
    engine = SimulatedEngine(scheduler, world, lambda step: 0.5, max_batched_tokens=8)
    while engine.turn():
        pass
    return scheduler, world, engine


@pytest.mark.parametrize("fail_at", [0, 1, 3, 5])
async def test_the_loop_is_the_engines(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    """The scheduler gets the same calls in the same order from the simulation as from the real engine, where a step fails
    too."""
    recorders: list[Recorder] = []

    class Kept(Recorder):
        def __init__(self, cache: PagedKvCache, **fields: Any) -> None:
            super().__init__(cache, **fields)
            recorders.append(self)

    monkeypatch.setattr(runtime, "UnifiedScheduler", Kept)
    config = {"batching": {"max_batched_tokens": 8}, "scheduler": {"max_running_requests": 4}}
    async with fake_engine(config, fail_at={fail_at}) as (engine, _):
        try:
            await engine.infer(PROMPT, max_tokens=6)
        except BackendError:
            assert fail_at
        await until(recorders[0].is_idle)
    simulated, _, _ = simulate_one(fail_at)

    assert simulated.busy_calls() == recorders[0].busy_calls()
    assert ("f" in simulated.calls) == bool(fail_at)


def test_virtual_time() -> None:
    """Eight steps of half a second (three chunks of a prompt, then five decodes), one behind the other, take four."""
    _, world, engine = simulate_one(fail_at=0)

    assert world.tokens == expected_tokens(PROMPT, 6)
    assert (engine.now, engine.busy_s, engine.num_steps) == (4.0, 4.0, 8)


def test_step_costs_add_up() -> None:
    """A step costs its base, and so much per token, per sequence and per token of context."""
    costs = StepCosts(base_s=1000.0, token_s=100.0, sequence_s=10_000.0, context_s=1.0)
    prefill, decode = PrefillInput(0, PROMPT[:5], 16, True), DecodeInput(1, 40)

    assert costs.step_s(StepWork.of(UnifiedBatch([], [prefill]))) == 1000 + 500 + 10_000 + 21
    assert costs.step_s(StepWork.of(UnifiedBatch([decode], [])), 3) == 3 * (1000 + 100 + 10_000 + 41)
    assert costs.step_s(StepWork.of(UnifiedBatch([decode], [prefill]))) == 1000 + 600 + 20_000 + 62


# -- the memory of digests ------------------------------------------------------------------------------------------------


def test_the_memory_refuses_what_no_scheduler_may_ask() -> None:
    """A step that goes on where its sequence is not, or past its pages, is WrongStep."""
    memory = DigestMemory(1, 2, 4)
    assigned = SlotAssignment(0, RequestId("a"), SamplingConfig(), [0])
    memory.execute(StepInput([assigned], [], [], UnifiedBatch([], [PrefillInput(0, PROMPT[:4], 0, True)])))

    with pytest.raises(WrongStep, match="holds 4 tokens, and decodes at 3"):
        memory.execute(StepInput([], [], [], UnifiedBatch([DecodeInput(0, 3)], [])))
    with pytest.raises(WrongStep, match="no page"):
        memory.execute(StepInput([], [], [], UnifiedBatch([DecodeInput(0, 4)], [])))
    with pytest.raises(WrongStep, match="out of range"):
        memory.execute(StepInput([SlotAssignment(1, RequestId("b"), SamplingConfig(), [1])], [], [], UnifiedBatch([], [])))


def test_what_a_damaged_step_wrote_shows() -> None:
    """Tokens that follow from pages of a step that failed are not those the request gets alone."""
    memory = DigestMemory(1, 2, 4)
    assigned = SlotAssignment(0, RequestId("a"), SamplingConfig(), [0, 1])
    memory.execute(StepInput([assigned], [], [], UnifiedBatch([], [PrefillInput(0, PROMPT[:4], 0, True)])), damaged=True)

    after = memory.execute(StepInput([], [], [], UnifiedBatch([DecodeInput(0, 4)], [])))

    assert after.decodes[0].sampled.token_id not in expected_tokens(PROMPT[:4], 2)


# -- what the simulation has found ----------------------------------------------------------------------------------------


def scheduler_of(num_pages: int) -> UnifiedScheduler:
    return UnifiedScheduler(PagedKvCache(num_pages, 4), num_slots=4, max_model_len=64)


def request_of(name: str, **fields: Any) -> SequenceRequest:
    return SequenceRequest(request_id=RequestId(name), token_ids=PROMPT, sampling=SamplingConfig(), **fields)


def test_deadlines_of_ended_requests_are_let_go() -> None:
    """While one request lives, nothing is kept of a thousand with later deadlines that have ended."""
    scheduler = scheduler_of(16)
    scheduler.submit(request_of("long", max_tokens=1, deadline=100.0))
    before = sum(sizes(scheduler).values())

    for number in range(1000):
        scheduler.submit(request_of(str(number), max_tokens=1, deadline=3600.0))
        scheduler.cancel(RequestId(str(number)))
        scheduler.next_deadline()

    assert sum(sizes(scheduler).values()) < before + 500


def test_siblings_outlive_a_first_sample_that_is_cancelled_early() -> None:
    """If the first of two samples is cancelled before it has computed the prompt, the other one does."""
    scheduler = scheduler_of(16)
    scheduler.submit(request_of("a", max_tokens=4, num_samples=2))

    scheduler.cancel(RequestId("a"), 0)

    assert scheduler.plan(BatchHint(now=0.0, max_tokens=64)) is not None


def test_a_deadline_does_not_take_back_a_sample_that_is_complete() -> None:
    """A request of which one sample is complete ends by finish_reason, not by DeadlineExceeded."""
    cache = PagedKvCache(6, 4)
    scheduler = UnifiedScheduler(cache, num_slots=1, max_model_len=24)
    scheduler.submit(request_of("a", max_tokens=1, num_samples=2, deadline=5.0))
    plan = scheduler.plan(BatchHint(now=0.0, max_tokens=64))
    assert plan is not None
    (done,) = scheduler.commit(plan, DigestMemory(1, 6, 4).execute(plan.step))
    assert done.finish_reason is FinishReason.LENGTH

    (update,) = scheduler.expire(6.0)

    assert (update.error, update.index, update.finish_reason) == (None, 1, FinishReason.DEADLINE)
