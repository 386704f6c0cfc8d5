"""Random lives of a small engine: everything in one follows from its seed.

Each seed draws an engine, and which faults there are and how often; so that some seeds have many of one kind, and others
none. Slots, pages and the step's budget are few.
"""

import enum
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import msgspec

from ferrum_rt.interfaces.config import ClientPolicy, SchedulerConfig
from ferrum_rt.interfaces.errors import BackendError, EngineFailed, FerrumError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import ClientId, Priority, RequestId, SessionId, TokenId
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.scheduling.waiting import INPUT_WEIGHT, OUTPUT_WEIGHT
from ferrum_rt.runtime.simulation.checks import Checker
from ferrum_rt.runtime.simulation.digests import DigestMemory, WrongStep, expected_tokens
from ferrum_rt.runtime.simulation.engine import SimulatedEngine, StepCosts
from ferrum_rt.runtime.simulation.policies import PolicyChecks
from ferrum_rt.runtime.simulation.violation import Invariant, Violation

EOS = TokenId(0)
MAX_TURNS = 20_000
MAX_OUTPUTS = 16
COSTS = StepCosts()
CLIENTS = tuple(ClientId(name) for name in ("ada", "bob", "cyd"))
SESSIONS = tuple(SessionId(name) for name in ("red", "green"))
DAY_S = 86_400.0


class Fault(enum.Enum):
    """What can go wrong, or get in the way. A request that is *guilty* makes every step fail that it has a part in."""

    CANCEL = enum.auto()
    CANCEL_SAMPLE = enum.auto()
    CANCEL_ENDED = enum.auto()
    PARK = enum.auto()
    NAN = enum.auto()
    GUILTY = enum.auto()
    STEP_FAILS = enum.auto()
    STALL = enum.auto()
    DEADLINE = enum.auto()
    CLOCK_JUMP = enum.auto()
    SESSION = enum.auto()
    END_SESSION = enum.auto()
    FORK_SESSION = enum.auto()


# Done by callers, at any moment when the loop awaits; the other faults happen to a step or are a request's own.
_ACTIONS = (
    Fault.CANCEL,
    Fault.CANCEL_SAMPLE,
    Fault.CANCEL_ENDED,
    Fault.PARK,
    Fault.NAN,
    Fault.GUILTY,
    Fault.CLOCK_JUMP,
    Fault.END_SESSION,
    Fault.FORK_SESSION,
)
# How likely each fault may be: none of that kind, or once in so many chances.
_RATES = (0.0, 0.0, 0.01, 0.04, 0.15)
_FREQUENCIES = {Fault.CLOCK_JUMP: 0.1, Fault.SESSION: 20, Fault.FORK_SESSION: 5}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One seed's engine. ``activity`` is how likely a caller does something when the loop awaits, ``rates`` how likely that,
    or a step, or a request, is each fault."""

    num_slots: int
    num_pages: int
    block_size: int
    max_model_len: int
    max_batched_tokens: int
    prefix_caching: bool
    num_host_pages: int
    page_bytes: int
    max_rounds: int
    num_requests: int
    activity: float
    rates: dict[Fault, float]
    policies: SchedulerConfig

    @property
    def max_lead(self) -> float:
        """Weighted tokens by which one client may be ahead of another that waits too: a prompt, and what those that run then
        put out, with the tokens that were under way and not counted yet. Any, where a client's share of the pages may be
        what it waits for."""
        if any(policy.max_page_share < 1 for policy in self.policies.clients.values()):
            return math.inf
        return INPUT_WEIGHT * self.max_model_len + OUTPUT_WEIGHT * self.num_slots * (MAX_OUTPUTS + 1)

    @classmethod
    def draw(cls, rng: Random) -> "Scenario":
        num_slots, block_size, max_len = rng.randint(1, 5), rng.choice((1, 2, 4, 8)), rng.randint(8, 40)
        least = -(-max_len // block_size)
        return cls(
            num_slots=num_slots,
            num_pages=least + rng.randint(0, least * rng.choice((1, 1, 4))),
            block_size=block_size,
            max_model_len=max_len,
            max_batched_tokens=num_slots + rng.choice((0, 3, 8, 20)),
            prefix_caching=rng.random() < 0.9,
            num_host_pages=rng.choice((0, least // 2, least, 2 * least, 4 * least)),
            page_bytes=rng.choice((1, 1, 10**7)),
            max_rounds=rng.choice((1, 2, 5)),
            num_requests=rng.randint(10, 60),
            activity=rng.choice((0.1, 0.3, 0.5)),
            rates={fault: rng.choice(_RATES) * _FREQUENCIES.get(fault, 1) for fault in Fault},
            policies=SchedulerConfig(
                ageing_steps=rng.choice((5, 50)),
                itl_target_s=COSTS.base_s * rng.choice((1.01, 2, 100)),
                min_prefill_tokens=rng.randint(1, 4),
                clients={"ada": ClientPolicy(weight=rng.choice((1.0, 3.0)), max_page_share=rng.choice((1.0, 0.6)))},
                session_ttl_s=COSTS.base_s * rng.choice((5, 100, 1e6)),
                max_sessions=rng.choice((1, 3, 8)),
            ),
        )


class Outcome(msgspec.Struct, frozen=True):
    """A seed that violated nothing. ``log`` is the hash of all events; ``longest_wait`` is in steps."""

    seed: int
    steps: int
    requests: int
    longest_wait: int
    log: str


def run_seed(
    seed: int,
    *,
    max_wait_steps: int | None = None,
    scheduler_type: type[UnifiedScheduler] = UnifiedScheduler,
    cache_type: type[PagedKvCache] = PagedKvCache,
    again: bool = False,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Live one seed to its end, with ``again`` once more; raises Violation. ``say`` gets a line for each event."""
    outcome = _live(seed, max_wait_steps, scheduler_type, cache_type, EventLog(say))
    if again and _live(seed, max_wait_steps, scheduler_type, cache_type, EventLog(None)) != outcome:
        raise Violation(Invariant.SAME_LOG, "its second life was another", seed, outcome.steps)
    return outcome


def _live(
    seed: int,
    max_wait_steps: int | None,
    scheduler_type: type[UnifiedScheduler],
    cache_type: type[PagedKvCache],
    log: "EventLog",
) -> Outcome:
    rng = Random(seed)
    scenario = Scenario.draw(rng)
    log.add("engine", str(scenario))
    cache = cache_type(scenario.num_pages, scenario.block_size, prefix_caching=scenario.prefix_caching)
    scheduler = scheduler_type(
        cache,
        num_slots=scenario.num_slots,
        max_model_len=scenario.max_model_len,
        config=scenario.policies,
        num_host_pages=scenario.num_host_pages,
        page_bytes=scenario.page_bytes,
        max_rounds=scenario.max_rounds,
    )
    policies = PolicyChecks(max_lead=scenario.max_lead, max_wait_steps=max_wait_steps)
    checker = Checker(scheduler, cache, policies, max_tokens=scenario.max_batched_tokens)
    world = RandomWorld(scenario, scheduler, checker, rng, log)
    try:
        world.run()
    except Violation as violation:
        violation.seed, violation.step = seed, checker.step
        raise
    return Outcome(seed, world.engine.num_steps, scenario.num_requests, policies.longest_wait, log.hexdigest())


class EventLog:
    """A hash of everything that went into the scheduler and came out of it, in order; ``say`` gets it as lines."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say = say
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, *event: object) -> None:
        self._hash.update(_ENCODER.encode(event))
        if self._say is not None:
            self._say("  ".join(str(part) for part in event))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class RandomWorld:
    """The callers of one seed's engine, and its executor: a World."""

    def __init__(
        self, scenario: Scenario, scheduler: UnifiedScheduler, checker: Checker, rng: Random, log: EventLog
    ) -> None:
        self.engine = SimulatedEngine(scheduler, self, self._step_s, max_batched_tokens=scenario.max_batched_tokens)
        self._scenario, self._scheduler, self._checker, self._rng = scenario, scheduler, checker, rng
        self._log = log
        self._memory = DigestMemory(scenario.num_slots, scenario.num_pages, scenario.block_size, _answer)
        self._text = [TokenId(rng.randint(1, 9)) for _ in range(scenario.max_model_len)]
        self._num_submitted = 0
        self._parked: set[RequestId] = set()
        self._nan: set[RequestId] = set()
        self._guilty: set[RequestId] = set()
        # What both sides said in a session, after each of its last turns.
        self._said: dict[tuple[ClientId, SessionId], list[list[TokenId]]] = {}
        self._weights = list(accumulate([0.3, *(scenario.rates[fault] for fault in _ACTIONS)]))

    def run(self) -> None:
        """To the end of all requests. Raises Violation."""
        checker, turns = self._checker, 0
        try:
            while self.engine.turn():
                checker.check(self.engine.num_steps)
                self._scheduler.swapping.verify()
                self._scheduler.sessions.verify()
                if len(self._scheduler.sessions) > self._scenario.policies.max_sessions:
                    raise Violation(Invariant.BOUNDED_MEMORY, f"{len(self._scheduler.sessions)} sessions are kept")
                for counters in self._scheduler.backlogs():
                    checker.policies.check_fair(counters)
                turns += 1
                if turns > MAX_TURNS:
                    raise Violation(Invariant.ONE_END, f"not at an end after {MAX_TURNS} turns: {', '.join(checker.live)}")
            checker.finish()
        except Violation:
            raise
        except WrongStep as error:
            raise Violation(Invariant.STEP, str(error)) from error
        except EngineFailed as error:
            raise Violation(Invariant.LEDGER, str(error)) from error
        except Exception as error:  # whatever it is, the scheduler must not raise it
            raise Violation(Invariant.NO_CRASH, repr(error)) from error

    # -- the World ----------------------------------------------------------------------------------------------------

    def pause(self, until: float) -> None:
        rng, activity = self._rng, self._scenario.activity
        if not self._checker.live:  # an idle engine finds no faults
            self._submit()
        while rng.random() < activity:
            number = rng.choices(range(len(self._weights)), cum_weights=self._weights)[0]
            self._submit() if number == 0 else self._act(_ACTIONS[number - 1])

    def next_event(self) -> float | None:
        has_more = self._num_submitted < self._scenario.num_requests or self._parked
        return self.engine.now + COSTS.base_s if has_more else None

    def execute(self, plan: BatchPlan) -> StepOutput:
        rows = self._checker.planned(plan.step)
        self._checker.expired(self.engine.expired_at)
        fails = self._rng.random() < self._scenario.rates[Fault.STEP_FAILS] or not self._guilty.isdisjoint(rows)
        self._log.add("step", plan.batch_id, "fails" if fails else "runs", plan.step)
        output = self._memory.execute(plan.step, nan=self._nan, damaged=fails)
        # A request that is alone in a step that fails cannot be told from a guilty one.
        at_fault = self._guilty if len(set(rows)) > 1 else rows
        for request_id in rows:
            if (fails and request_id in at_fault) or request_id in self._nan:
                self._checker.failed(request_id)
        if fails:
            raise BackendError("this step was told to fail")
        return output

    def take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self._log.add("update", update)
            self._checker.take(update)
        self._parked.intersection_update(self._checker.live)

    def _step_s(self, step: StepInput) -> float:
        stalls = self._rng.random() < self._scenario.rates[Fault.STALL]
        return COSTS.step_s(StepWork.of(step.batch), step.batch.num_rounds) * (1000 if stalls else 1)

    # -- callers ------------------------------------------------------------------------------------------------------

    def _act(self, fault: Fault) -> None:
        rng, checker = self._rng, self._checker
        if fault is Fault.CLOCK_JUMP:
            self.engine.now += DAY_S
            self._log.add("the clock jumps to", self.engine.now)
        elif fault is Fault.CANCEL_ENDED:
            self._cancel(RequestId(f"r{rng.randint(0, self._num_submitted)}"), None)
        elif fault in (Fault.END_SESSION, Fault.FORK_SESSION):
            self._change_session(fault)
        elif live := checker.live:
            request_id = rng.choice(live)
            match fault:
                case Fault.CANCEL:
                    self._cancel(request_id, None)
                case Fault.CANCEL_SAMPLE if samples := checker.speaking(request_id):
                    self._cancel(request_id, rng.choice(samples), ends_well=rng.random() < 0.5)
                case Fault.PARK:
                    self._park_or_unpark(request_id)
                case Fault.NAN:
                    self._nan.add(request_id)
                case Fault.GUILTY:
                    self._guilty.add(request_id)

    def _submit(self) -> None:
        scenario, rng = self._scenario, self._rng
        if self._num_submitted == scenario.num_requests:
            return
        client_id = rng.choice(CLIENTS)
        session_id = rng.choice(SESSIONS) if rng.random() < scenario.rates[Fault.SESSION] else None
        token_ids = self._prompt(client_id, session_id)
        has_deadline = rng.random() < scenario.rates[Fault.DEADLINE]
        request = SequenceRequest(
            request_id=RequestId(f"r{self._num_submitted}"),
            token_ids=token_ids,
            max_tokens=rng.randint(1, min(MAX_OUTPUTS, scenario.max_model_len - len(token_ids))),
            sampling=_SAMPLING,
            eos_token_ids=_ENDS,
            priority=rng.choice(_PRIORITIES),
            deadline=self.engine.now + rng.uniform(0, 50) * COSTS.base_s if has_deadline else None,
            salt=rng.choice(_SALTS),
            num_samples=rng.choice((1, 1, 1, 2, 3)),
            client_id=client_id,
            session_id=session_id,
        )
        self._num_submitted += 1
        try:
            self._scheduler.submit(request)
        except FerrumError as error:
            self._log.add("refused", request, type(error).__name__)
            return
        self._log.add("submit", request)
        expected = [
            expected_tokens(request.token_ids, request.max_tokens, _answer, sample, EOS)
            for sample in range(request.num_samples)
        ]
        self._checker.submitted(request, expected)
        if session_id is not None:
            turns = self._said.setdefault((client_id, session_id), [])
            turns[:] = [*turns[-2:], token_ids + expected[0]]

    def _prompt(self, client_id: ClientId, session_id: SessionId | None) -> list[TokenId]:
        """The text that many begin with, or what was said in the session, now or a turn or two ago: often all of it, else up
        to where it parts from there; and something new."""
        rng, max_len = self._rng, self._scenario.max_model_len
        turns = self._said.get((client_id, session_id), []) if session_id is not None else []
        known = rng.choice([*turns, *turns[-1:]]) if turns else self._text
        if not turns or len(known) >= max_len - 1:
            length = rng.randint(1, max_len - 1)
            known = self._text[: rng.randint(0, length)]
        else:
            known = known if rng.random() < 0.7 else known[: rng.randint(0, len(known))]
            length = rng.randint(len(known) + 1, min(len(known) + 6, max_len - 1))
        return known + [TokenId(rng.randint(1, 9)) for _ in range(length - len(known))]

    def _change_session(self, fault: Fault) -> None:
        client_id, one = self._rng.choice(list(self._said) or [(CLIENTS[0], SESSIONS[0])])
        other = self._rng.choice([name for name in SESSIONS if name != one])
        self._log.add(fault.name, client_id, one, other)
        if fault is Fault.END_SESSION:
            self._scheduler.sessions.end(client_id, one)
            return
        try:
            self._scheduler.sessions.fork(client_id, one, other)
        except FerrumError as error:
            self._log.add("refused", type(error).__name__)
        else:
            self._said[client_id, other] = list(self._said[client_id, one])

    def _cancel(self, request_id: RequestId, index: int | None, *, ends_well: bool = False) -> None:
        self._log.add("end, as by a stop string" if ends_well else "cancel", request_id, index)
        if ends_well and index is not None:
            was_here = self._scheduler.end_well(request_id, index)
        else:
            was_here = self._scheduler.cancel(request_id, index)
        self._checker.cancelled(request_id, index, was_here)
        self._parked.intersection_update(self._checker.live)

    def _park_or_unpark(self, request_id: RequestId) -> None:
        if request_id in self._parked:
            self._log.add("unpark", request_id)
            self._scheduler.unpark(request_id)
            self._parked.remove(request_id)
            self._checker.unparked(request_id)
        elif self._num_submitted < self._scenario.num_requests:  # at the end everybody reads what is left
            self._log.add("park", request_id)
            self._scheduler.park(request_id)
            self._parked.add(request_id)
            self._checker.parked(request_id)


def _answer(digest: int) -> TokenId:
    """An Answer: EOS once in 24 tokens; the others hardly ever come twice."""
    return EOS if digest % 24 == 0 else TokenId(1 + digest % 1_000_003)


def _encode_error(value: object) -> str:
    return type(value).__name__


_SAMPLING, _ENDS = SamplingConfig(), frozenset({EOS})
_PRIORITIES, _SALTS = tuple(Priority), (b"", b"another's")
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_error)
