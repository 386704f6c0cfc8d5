"""What a user has under way, counted on its own."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.users import Cost, User
from ferrum_rt.interfaces.errors import ResourceExhausted
from ferrum_rt.runtime.generation import Generation

LIMITS = DaemonLimits(user_requests=4, user_tokens=100, user_bytes=1000)


class Queued:
    """The one thing of a Generation that is looked at."""

    def __init__(self, *, is_queued: bool) -> None:
        self.is_queued = is_queued


def generation(*, is_queued: bool) -> Generation:
    return cast(Generation, Queued(is_queued=is_queued))


def has(user: User) -> tuple[int, int, int]:
    return user.num_requests, user.num_tokens, user.num_bytes


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ([Cost(1, 1)] * 4, Cost(1, 1), "requests"),
        ([Cost(60, 1)], Cost(41, 1), "tokens"),
        ([Cost(1, 900)], Cost(1, 101), "bytes"),
    ],
)
def test_each_limit_is_kept_and_named(first: list[Cost], second: Cost, name: str) -> None:
    """What would pass a limit is refused by its name and changes no count; what reaches it exactly is taken."""
    user = User(1000)
    for cost in first:
        user.take(cost, LIMITS)
    before = has(user)
    with pytest.raises(ResourceExhausted, match=rf"this user has \d+ {name} under way"):
        user.take(second, LIMITS)
    assert has(user) == before
    user.give_back(first[0], None)
    user.take(second, LIMITS)


def test_a_request_counts_until_it_has_left_the_queues() -> None:
    """One that ended in a queue takes its place until it is out of it, and the next request sees that by itself."""
    user, waiting = User(1000), generation(is_queued=True)
    for _ in range(4):
        user.take(Cost(10, 10), LIMITS)
    user.give_back(Cost(10, 10), waiting)
    with pytest.raises(ResourceExhausted):
        user.take(Cost(10, 10), LIMITS)
    waiting.is_queued = False
    user.take(Cost(10, 10), LIMITS)
    assert has(user) == (4, 40, 40)


def test_what_waits_in_connections_takes_room_from_requests() -> None:
    """Bytes of unread output and of unfinished frames count against the same limit as requests."""
    user = User(1000)
    user.num_bytes += 950
    with pytest.raises(ResourceExhausted, match="bytes"):
        user.take(Cost(1, 51), LIMITS)
    user.take(Cost(1, 50), LIMITS)


@given(st.lists(st.tuples(st.sampled_from(["take", "end", "end queued", "leave queue", "settle"]), st.integers(0, 60))))
def test_the_counts_are_those_of_the_requests(steps: list[tuple[str, int]]) -> None:
    """Whatever is taken and given back in whatever order, the counts are the sum of what has not left, no limit is passed,
    and at the end nothing is left."""
    user = User(1000)
    running: list[Cost] = []
    queued: list[tuple[Generation, Cost]] = []
    for action, size in steps:
        if action == "take":
            try:
                user.take(Cost(size, 10 * size), LIMITS)
                running.append(Cost(size, 10 * size))
            except ResourceExhausted:
                pass
        elif action.startswith("end") and running:
            cost, ended = running.pop(size % len(running)), generation(is_queued=action == "end queued")
            user.give_back(cost, ended)
            if ended.is_queued:
                queued.append((ended, cost))
        elif action == "leave queue" and queued:
            queued[size % len(queued)][0].is_queued = False
        elif action == "settle":
            user.settle()
        least = [*running, *(cost for one, cost in queued if one.is_queued)]
        assert len(least) <= user.num_requests <= LIMITS.user_requests
        assert sum(cost.tokens for cost in least) <= user.num_tokens <= LIMITS.user_tokens
    for one, _ in queued:
        one.is_queued = False
    for cost in running:
        user.give_back(cost, generation(is_queued=False))
    user.settle()
    assert has(user) == (0, 0, 0)
