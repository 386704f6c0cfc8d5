"""Who is served, and when: shares by tokens, priorities that age, deadlines, limits of a client."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import DeadlineExceeded, ResourceExhausted
from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.types import ClientId, FinishReason, Priority
from ferrum_rt.runtime.scheduling.waiting import INPUT_WEIGHT, OUTPUT_WEIGHT
from tests.runtime.scheduling.schedules import Schedule


def by_tokens(step: StepInput) -> float:
    """Seconds: 5 ms, and 0.1 ms a token."""
    return 0.005 + 1e-4 * step.batch.num_tokens


def flood(schedule: Schedule, client: str, count: int, max_tokens: int) -> None:
    for number in range(count):
        schedule.submit(
            f"{client}-{number}", client=client, prompt=[100, *client.encode(), number % 100], max_tokens=max_tokens
        )


# -- shares ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_backlogged_client_gets_its_share(weight: float) -> None:
    """Beside a client with ten times as many requests waiting, one is served its weight's share of the tokens to within 5 %,
    while both have requests waiting."""
    schedule = Schedule(num_slots=8, clients={"few": {"weight": weight}})
    flood(schedule, "many", 400, max_tokens=20)
    flood(schedule, "few", 60 * int(weight), max_tokens=20)
    for _ in range(200):
        schedule.step()
    served, share = schedule.served, weight / (1 + weight)
    assert schedule.num_waiting("few") > 0
    assert served[ClientId("few")] / served.total() == pytest.approx(share, rel=0.05)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_difference_in_service_is_bounded(seed: int) -> None:
    """Of two clients that both have requests waiting from some step to another, neither is served more than the other by
    more than VTC's bound (Theorem 4.4 there), whatever their requests are like."""
    generator = random.Random(seed)
    num_slots, num_pages, block_size = generator.randint(1, 6), generator.randint(40, 120), 4
    schedule = Schedule(num_slots=num_slots, num_pages=num_pages, block_size=block_size, ageing_steps=10**6)
    names = ["a", "b", "c"]
    longest = 0
    for number in range(generator.randint(40, 120)):
        client = generator.choice(names + ["a"] * 4)
        prompt = [generator.randrange(256) for _ in range(generator.randint(1, 40))]
        longest = max(longest, len(prompt))
        schedule.submit(f"{number}", client=client, prompt=prompt, max_tokens=generator.randint(1, 30))
    bound = 2 * max(INPUT_WEIGHT * longest, OUTPUT_WEIGHT * num_pages * block_size)
    charged: dict[ClientId, float] = defaultdict(float)
    seen, starts = dict.fromkeys(schedule.requests, 0), set[str]()
    differences: dict[tuple[str, str], list[float]] = defaultdict(list)
    while schedule.step():
        for name, request in schedule.requests.items():
            new = len(schedule.tokens[name]) - seen[name]
            if new:
                seen[name] += new
                charged[request.client_id] += OUTPUT_WEIGHT * new
                if name not in starts:
                    starts.add(name)
                    charged[request.client_id] += INPUT_WEIGHT * len(request.token_ids)
        for one in names:
            for other in names:
                if one < other and all(schedule.num_waiting(client) for client in (one, other)):
                    differences[one, other].append(charged[ClientId(one)] - charged[ClientId(other)])
    for values in differences.values():
        assert max(values) - min(values) <= bound
    schedule.check_tokens()
    assert len(schedule.ends) == len(schedule.requests)


def test_who_stays_away_saves_up_nothing() -> None:
    """A client that comes when another has been served for long shares from then on, and does not catch up."""
    schedule = Schedule(num_slots=4)
    flood(schedule, "old", 200, max_tokens=10)
    for _ in range(100):
        schedule.step()
    before = schedule.served[ClientId("old")]
    flood(schedule, "new", 200, max_tokens=10)
    for _ in range(100):
        schedule.step()
    new, old = schedule.served[ClientId("new")], schedule.served[ClientId("old")] - before
    assert new / (new + old) == pytest.approx(0.5, abs=0.05)


def time_to_first_token(schedule: Schedule, *, with_flood: bool) -> float:
    """The p99 of a client that asks now and then, for 300 tokens of prompt at a time."""
    generator = random.Random(1)
    if with_flood:
        flood(schedule, "flood", 3000, max_tokens=64)
    for _ in range(40):
        schedule.step()
    times = []
    for number in range(60):
        prompt = [generator.randrange(256) for _ in range(300)]
        name = schedule.submit(f"light-{number}", client="light", prompt=prompt, max_tokens=4)
        asked = schedule.now
        while name not in schedule.ends:
            assert schedule.step()
        times.append(schedule.first_token_at[name] - asked)
        for _ in range(generator.randint(0, 5)):
            if not schedule.step():
                schedule.now += 0.02
    return sorted(times)[-1]


@pytest.mark.slow
def test_a_flood_does_not_keep_another_waiting() -> None:
    """Beside a client that has thousands of requests waiting, another's worst time to the first token is at most twice what
    it is alone."""
    alone, beside = (
        time_to_first_token(Schedule(num_slots=32, num_pages=4096, max_tokens=512, step_s=by_tokens), with_flood=with_flood)
        for with_flood in (False, True)
    )
    assert beside <= 2 * alone


def test_slots_are_given_back_to_who_has_none() -> None:
    """A client that comes when another holds every slot gets its share of them at once, and no more."""
    schedule = Schedule(num_slots=8)
    flood(schedule, "first", 20, max_tokens=200)
    for _ in range(5):
        schedule.step()
    flood(schedule, "second", 20, max_tokens=200)
    for _ in range(10):
        schedule.step()
    counts = {name: client.num_running for name, client in schedule.scheduler.diagnostics().clients.items()}
    assert counts == {"first": 4, "second": 4}
    before = schedule.scheduler.statistics().preemptions
    for _ in range(50):
        schedule.step()
    assert schedule.scheduler.statistics().preemptions == before, "slots go to and fro"
    schedule.run()
    schedule.check_tokens()


# -- priorities -----------------------------------------------------------------------------------------------------------


def test_the_urgent_take_slots_from_the_others() -> None:
    """A request of a higher priority runs in the next step although every slot is taken; who made way ends well too."""
    schedule = Schedule(num_slots=2)
    flood(schedule, "a", 4, max_tokens=50)
    for _ in range(4):
        schedule.step()
    name = schedule.submit("urgent", priority=Priority.HIGH, max_tokens=3)
    for _ in range(5):
        schedule.step()
    assert name in schedule.ends
    schedule.run()
    schedule.check_tokens()
    assert set(schedule.ends.values()) == {FinishReason.LENGTH}


def test_nobody_waits_for_ever_behind_a_higher_priority() -> None:
    """Beside an endless row of urgent requests, one of low priority has begun after three times ``ageing_steps`` and what
    its share then takes."""
    schedule = Schedule(num_slots=1, ageing_steps=20)
    low = schedule.submit("low", client="patient", priority=Priority.LOW, max_tokens=2)
    steps = 0
    while low not in schedule.ends:
        schedule.submit(f"urgent-{steps}", client="urgent", priority=Priority.CRITICAL, max_tokens=2)
        schedule.step()
        steps += 1
        assert steps < 3 * 20 + 20
    assert steps > 3 * 20


def test_deadlines_first_then_who_came_first() -> None:
    """Of one client's requests the one due first runs first; those without a deadline keep their order."""
    schedule = Schedule(num_slots=1)
    running = schedule.submit("running", max_tokens=3)
    schedule.step()
    names = [schedule.submit("one"), schedule.submit("two"), schedule.submit("due", deadline_s=30.0)]
    schedule.run()
    assert list(schedule.first_token_at) == [running, names[2], names[0], names[1]]


def test_a_deadline_that_cannot_be_met_is_not_waited_for() -> None:
    """A request whose prompt takes longer than it has left is dropped before its deadline; one that can be served is."""
    schedule = Schedule(num_slots=4, max_tokens=512, step_s=by_tokens)
    flood(schedule, "a", 60, max_tokens=10)
    schedule.run()
    asked = schedule.now
    hopeless = schedule.submit("hopeless", prompt=list(range(250)) * 2, deadline_s=0.03)  # its prompt takes 0.055
    served = schedule.submit("served", prompt=list(range(250)), deadline_s=1.0)
    schedule.step()
    assert isinstance(schedule.ends[hopeless], DeadlineExceeded)
    assert schedule.now - asked < 0.03
    schedule.run()
    assert schedule.ends[served] is FinishReason.LENGTH


# -- limits ---------------------------------------------------------------------------------------------------------------


def test_a_clients_queued_tokens_are_limited() -> None:
    """More tokens of prompts than a client may have waiting are refused with ResourceExhausted; another client is not."""
    schedule = Schedule(num_slots=1, clients={"greedy": {"max_queued_tokens": 20}})
    for number in range(2):
        schedule.submit(f"{number}", client="greedy", prompt=range(10))
    with pytest.raises(ResourceExhausted, match="30 tokens of client 'greedy'"):
        schedule.submit("2", client="greedy", prompt=range(10))
    schedule.submit("3", client="other", prompt=range(10))
    schedule.run()
    schedule.submit("4", client="greedy", prompt=range(10))


def test_a_clients_share_of_pages_is_limited() -> None:
    """A client at its share of pages gets no further request admitted while another's are, and one it may always run."""
    schedule = Schedule(num_slots=8, num_pages=64, clients={"wide": {"max_page_share": 0.25}})
    for number in range(8):
        schedule.submit(f"wide-{number}", client="wide", prompt=[number] * 20, max_tokens=12)
    for number in range(4):
        schedule.submit(f"other-{number}", client="other", prompt=[100 + number] * 20, max_tokens=12)
    for _ in range(4):
        schedule.step()
    clients = schedule.scheduler.diagnostics().clients
    assert clients[ClientId("wide")].num_pages <= 24  # 16 and what running ones grow by
    assert clients[ClientId("other")].num_running == 4
    schedule.run()
    schedule.check_tokens()


# -- pace -----------------------------------------------------------------------------------------------------------------


def test_prompts_leave_decodes_their_pace() -> None:
    """Once the cost of steps is known, those with decodes take no longer than the target, however long the prompts beside
    them are."""
    longest: list[float] = []

    def timed(step: StepInput) -> float:
        if step.batch.decodes and step.batch.prefills:
            longest.append(by_tokens(step))
        return by_tokens(step)

    schedule = Schedule(num_slots=4, num_pages=1024, max_tokens=512, step_s=timed, itl_target_s=0.015, min_prefill_tokens=16)
    flood(schedule, "a", 40, max_tokens=10)
    schedule.run()
    longest.clear()
    schedule.submit("decoding", max_tokens=200)
    for _ in range(3):
        schedule.step()
    schedule.submit("long", prompt=list(range(200)) * 4, max_tokens=1)
    schedule.run()
    assert len(longest) > 5
    assert max(longest) <= 0.015 * 1.1
