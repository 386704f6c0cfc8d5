"""A step that fails: its cause is found, and costs nobody else anything."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import BackendError
from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.types import FinishReason, RequestId
from tests.runtime.scheduling.schedules import Schedule


class Cause:
    """The executor raises in every step with one of these requests, once it has so many outputs."""

    def __init__(self, after: dict[str, int]) -> None:
        self.after = {RequestId(name): count for name, count in after.items()}
        self._owners: dict[int, RequestId] = {}
        self.schedule: Schedule
        self.num_failed = 0

    def __call__(self, step: StepInput) -> bool:
        self._owners |= {assigned.slot: assigned.request_id for assigned in step.assigned}
        slots = [item.slot for item in step.batch.decodes] + [item.slot for item in step.batch.prefills]
        failed = any(
            len(self.schedule.tokens[name]) >= self.after[name]
            for name in (self._owners[slot] for slot in slots)
            if name in self.after
        )
        self.num_failed += failed
        return failed


def schedule_with(cause: Cause, **fields: Any) -> Schedule:
    cause.schedule = Schedule(fails=cause, **fields)
    return cause.schedule


@pytest.mark.parametrize("after", [0, 1, 7])
def test_only_the_cause_fails(after: int) -> None:
    """Of 16 requests that run together one makes its steps fail, from its prompt or from a later token on: it ends with the
    error, the others with the tokens they would have had, after at most ten steps that failed."""
    cause = Cause({"11": after})
    schedule = schedule_with(cause, num_slots=16)
    for number in range(16):
        schedule.submit(f"{number}", prompt=[number, 1, 2], max_tokens=12)
    schedule.run()
    assert isinstance(schedule.ends.pop(RequestId("11")), BackendError)
    assert set(schedule.ends.values()) == {FinishReason.LENGTH}
    assert len(schedule.ends) == 15
    schedule.check_tokens()
    assert 0 < cause.num_failed <= 10


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_causes_are_found(seed: int) -> None:
    """Whichever requests make steps fail, with few pages, samples, cancellations and parked ones about: those fail and no
    other, each once, and nothing is left behind."""
    generator = random.Random(seed)
    count = generator.randint(2, 14)
    guilty = {f"{n}": generator.randint(0, 6) for n in range(count) if generator.random() < 0.3}
    schedule = schedule_with(Cause(guilty), num_slots=generator.randint(1, 8), num_pages=generator.randint(16, 64))
    gone = set[str]()
    for number in range(count):
        prompt = [generator.randrange(256) for _ in range(generator.randint(1, 20))]
        schedule.submit(
            f"{number}", prompt=prompt, max_tokens=generator.randint(9, 14), num_samples=generator.choice([1, 1, 1, 2])
        )
        for _ in range(generator.randint(0, 3)):
            schedule.step()
        name = RequestId(f"{generator.randrange(count)}")
        match generator.randrange(4):
            case 0 if generator.random() < 0.3 and schedule.scheduler.cancel(name):
                gone.add(name)
            case 1:
                schedule.scheduler.park(name)
                schedule.step()
                schedule.scheduler.unpark(name)
    schedule.run()
    failed = {name for name, end in schedule.ends.items() if isinstance(end, BackendError)}
    assert failed == set(guilty) - gone
    schedule.check_tokens()
    assert schedule.cache.statistics().pages.active == 0


def test_a_step_that_fails_once_costs_nobody_anything() -> None:
    """Where it was no request's doing, all end well."""
    failures = iter([False, False, False, True, True] + [False] * 1000)
    schedule = Schedule(num_slots=8, fails=lambda step: next(failures))
    for number in range(8):
        schedule.submit(f"{number}", prompt=[number], max_tokens=10)
    schedule.run()
    assert list(schedule.ends.values()) == [FinishReason.LENGTH] * 8
    schedule.check_tokens()


def test_what_failed_is_shared_with_nobody() -> None:
    """Pages that a request had when it failed are not hit by the next with the same prompt."""
    cause = Cause({"0": 3})
    schedule = schedule_with(cause)
    prompt = list(range(40))
    schedule.submit("0", prompt=prompt)
    schedule.run()
    assert schedule.cache.statistics().pages.cached == 0
    schedule.submit("1", prompt=prompt)
    schedule.run()
    assert schedule.cache.statistics().hit_tokens == 0
    schedule.check_tokens()
