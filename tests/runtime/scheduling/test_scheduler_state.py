"""A scheduler's work as JSON, and another that goes on with it."""

import random

import msgspec
import pytest

from ferrum_rt.interfaces.scheduler import SavedState
from ferrum_rt.interfaces.types import ClientId, FinishReason, Priority, SessionId, TokenId
from ferrum_rt.runtime.scheduling.saved_state import restored
from ferrum_rt.runtime.simulation.digests import expected_tokens
from tests.runtime.engines import fake_engine
from tests.runtime.scheduling.schedules import Schedule


@pytest.mark.parametrize("seed", range(20))
def test_another_scheduler_goes_on_with_it(seed: int) -> None:
    """Saved in the middle, written as JSON, read and taken over, everything under way ends with the tokens that it would
    have had, from those on that it had."""
    generator = random.Random(seed)
    first = Schedule(num_slots=3, num_pages=40)
    for number in range(12):
        prompt = [generator.randrange(256) for _ in range(generator.randint(1, 12))]
        first.submit(
            f"{number}",
            prompt=prompt,
            max_tokens=generator.randint(2, 12),
            client=generator.choice("ab"),
            priority=generator.choice(list(Priority)),
            deadline_s=generator.choice([None, 1000.0]),
        )
        for _ in range(generator.randint(0, 2)):
            first.step()
    state = msgspec.json.decode(msgspec.json.encode(first.scheduler.export_state(first.now)), type=SavedState)
    assert {saved.request_id for saved in state.requests} == set(first.requests) - set(first.ends)

    second = Schedule(num_slots=3, num_pages=40)
    second.requests = first.requests
    second.scheduler.import_state(state, now=0.0)
    second.run()
    for saved in state.requests:
        tokens = saved.outputs[0] + second.tokens[saved.request_id]
        assert tokens == expected_tokens(saved.token_ids, saved.max_tokens)
        assert second.ends[saved.request_id] is FinishReason.LENGTH


def test_what_clients_were_served_goes_along() -> None:
    """The client that was served less before is the one that is next after."""
    first = Schedule(num_slots=1)
    first.submit("0", client="served", max_tokens=20)
    first.submit("1", client="served", max_tokens=20)
    for _ in range(15):
        first.step()
    first.submit("2", client="new", max_tokens=2)
    second = Schedule(num_slots=1)
    second.requests = first.requests
    second.scheduler.import_state(first.scheduler.export_state(first.now), now=0.0)
    served = second.scheduler.diagnostics().clients[ClientId("served")].served["normal"]
    assert served > 20


def test_parked_requests_stay_parked() -> None:
    """A request that was parked waits for its unpark in the new scheduler too."""
    first = Schedule()
    name = first.submit("0", max_tokens=5)
    first.step()
    first.scheduler.park(name)
    second = Schedule()
    second.requests = first.requests
    second.scheduler.import_state(first.scheduler.export_state(first.now), now=0.0)
    second.run()
    assert not second.ends
    second.scheduler.unpark(name)
    second.run()
    assert second.ends == {name: FinishReason.LENGTH}


async def test_what_a_live_engine_has_under_way() -> None:
    """A live engine's state, written as JSON and taken over by a scheduler of its own, ends as the engine would have."""
    async with fake_engine(step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", max_tokens=30, stop_token_ids=[7], session_id=SessionId("s")) as chunks:
            await anext(aiter(chunks))
            state = msgspec.json.decode(msgspec.json.encode(engine.export_state()), type=SavedState)
    [saved] = state.requests
    assert (saved.stop_token_ids, saved.session_id) == (frozenset({TokenId(7)}), SessionId("s"))
    second = Schedule()
    second.requests = {saved.request_id: restored(saved, now=0.0)}
    second.scheduler.import_state(state, now=0.0)
    second.run()
    assert saved.outputs[0]
    assert saved.outputs[0] + second.tokens[saved.request_id] == expected_tokens(saved.token_ids, 30)
    assert second.scheduler.sessions.end(saved.client_id, SessionId("s"))
