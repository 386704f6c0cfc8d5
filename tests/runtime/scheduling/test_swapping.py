"""Preemption by swapping: when it is done, what comes back, and that no host page is lost."""

from typing import Any

import pytest

from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import ConfigError, EngineFailed
from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.types import FinishReason, RequestId
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from tests.runtime.scheduling.schedules import Schedule


def swapping_schedule(num_host_pages: int = 64, *, bytes_per_s: float = 1e15, **fields: Any) -> Schedule:
    """Few pages, whose way back takes no time. The cost model has seen enough steps, else nothing is swapped."""
    schedule = Schedule(num_pages=10, prefix_caching=False, num_host_pages=num_host_pages, **fields)
    schedule.submit("warm", max_tokens=30)
    schedule.run()
    schedule.scheduler.swapping.bytes_per_s = bytes_per_s
    return schedule


def submit_two(schedule: Schedule) -> None:
    for name in ("a", "b"):
        schedule.submit(name, prompt=[*name.encode(), 1, 2, 3], max_tokens=30)


def num_prefilled(schedule: Schedule) -> list[int]:
    """Tokens of each prefill from now on."""
    found: list[int] = []

    def look(step: StepInput) -> bool:
        found.extend(len(item.token_ids) for item in step.batch.prefills)
        return False

    schedule._fails = look
    return found


def test_a_swapped_sequence_computes_nothing_again() -> None:
    """Two requests that do not fit together: whoever is preempted comes back with one token to compute, has the tokens it
    has alone, and no host page is held in the end."""
    schedule = swapping_schedule()
    prefilled = num_prefilled(schedule)
    submit_two(schedule)
    schedule.run()
    schedule.check_tokens()
    swapping = schedule.scheduler.swapping
    assert schedule.scheduler.statistics().preemptions > 0
    assert prefilled == [4, 4] + [1] * (len(prefilled) - 2)
    assert swapping.num_in == swapping.num_out > 0
    swapping.verify()


@pytest.mark.parametrize(("num_host_pages", "bytes_per_s"), [(64, 1e-3), (2, 1e15), (0, 1e15)])
def test_it_is_computed_again_where_that_is_cheaper(num_host_pages: int, bytes_per_s: float) -> None:
    """A host that is slow, or has too few pages, gets none; the tokens are the same."""
    schedule = swapping_schedule(num_host_pages, bytes_per_s=bytes_per_s)
    submit_two(schedule)
    schedule.run()
    schedule.check_tokens()
    assert schedule.scheduler.statistics().preemptions > 0
    assert schedule.scheduler.swapping.num_out == 0


def test_nothing_is_swapped_before_steps_times_are_known() -> None:
    """Without a cost model nobody can say what is cheaper, and pages are computed again."""
    schedule = swapping_schedule()
    schedule.scheduler.swapping._costs.coefficients = [0.0] * 4
    submit_two(schedule)
    schedule.step()
    sequence = schedule.scheduler._residents.running[0]
    schedule.scheduler.swapping.swap_out(sequence)
    assert sequence not in schedule.scheduler.swapping


def test_a_cancelled_sequence_gives_its_host_pages_back_at_once() -> None:
    """Whoever is swapped and cancelled holds no host page when cancel returns."""
    schedule = swapping_schedule()
    submit_two(schedule)
    swapping = schedule.scheduler.swapping
    while not swapping.num_out:
        schedule.step()
    name = next(iter(swapping._swapped)).request.request_id
    schedule.scheduler.cancel(name)
    assert not swapping._swapped
    assert sorted(swapping._free) == list(range(64))
    schedule.run()
    del schedule.requests[name]
    (other,) = {RequestId("a"), RequestId("b")} - {name}
    assert schedule.ends[other] is FinishReason.LENGTH


def test_the_bandwidth_is_learnt() -> None:
    """What steps with swaps take beyond their work is the time of their pages."""
    schedule = swapping_schedule(bytes_per_s=1e9)
    swapping = schedule.scheduler.swapping
    work = StepWork(4, 4, 40)
    for _ in range(60):
        swapping.observe(10, work, swapping._costs.predict(work) + 0.01)
    assert swapping.bytes_per_s == pytest.approx(10 * 1000 / 0.01, rel=0.01)


def test_a_host_page_that_is_free_twice_is_found() -> None:
    """verify names the page."""
    schedule = swapping_schedule()
    schedule.scheduler.swapping._free.append(3)
    with pytest.raises(EngineFailed, match="host page ledger: page 3"):
        schedule.scheduler.swapping.verify()


def test_a_negative_pool_is_named() -> None:
    """A ConfigError names the field."""
    with pytest.raises(ConfigError, match=r"memory\.swap_bytes"):
        build_config(None, None, {"memory": {"swap_bytes": -1}})
