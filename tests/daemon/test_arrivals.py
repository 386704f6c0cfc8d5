"""The trace of a daemon's requests: who is told, and how much fits into a frame."""

import os
from pathlib import Path

import pytest

from ferrum_rt.interfaces.errors import PermissionDenied
from ferrum_rt.interfaces.types import Arrival, ClientId
from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.messages import Query, Refused
from ferrum_rt.runtime.arrivals import MAX_ARRIVALS
from ferrum_rt.runtime.runtime import Runtime
from tests.daemon.serving import daemon, server
from tests.daemon.test_quotas import NOBODY, US, as_root, connected_as, open_directory
from tests.daemon.test_session import HELLO, ask, connected

__all__ = ["open_directory"]  # a fixture


def fill(engine: Runtime, name: str) -> None:
    """As if so many requests had ended, of a client of this name, the last with the most tokens."""
    for number in range(1, MAX_ARRIVALS + 1):
        arrival = Arrival(arrival_s=1e6 + number / 7, prompt_tokens=number, output_tokens=2**20, client=ClientId(name))
        engine._arrivals._ended.append(arrival)


async def test_the_operator_is_told_of_all_users(tmp_path: Path) -> None:
    """The client's list is the engine's own, of every user's requests, under the names that the scheduler knows."""
    async with daemon(tmp_path) as (engine, path), connect(path) as client:
        assert await client.fetch_arrivals() == []
        await engine.infer("here", max_tokens=2)
        await client.infer("there", max_tokens=3, client_id=ClientId("ada"), deadline_s=9.5)
        arrivals = await client.fetch_arrivals()
        assert arrivals == engine.arrivals()
    assert [(arrival.client, arrival.output_tokens) for arrival in arrivals] == [
        ("default", 2),
        (f"uid {os.getuid()}/ada", 3),
    ]


async def test_nobody_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the daemon serves but who does not run it is PermissionDenied, and is served as before."""
    async with daemon(tmp_path) as (_, path), connect(path) as client:
        await client.infer("x", max_tokens=3)
        monkeypatch.setattr(os, "geteuid", lambda: US + 1)
        with pytest.raises(PermissionDenied, match="arrivals"):
            await client.fetch_arrivals()
        assert (await client.status()).requests.finished == 1


@as_root
async def test_another_user_is_not_told(open_directory: Path) -> None:
    """Not of its own requests either; and the one who runs the daemon is."""
    async with server(open_directory, uids=(US, NOBODY)) as (_, path, _):
        path.chmod(0o666)
        async with connected_as(path, NOBODY) as other, connect(path) as operator:
            await other.say(HELLO, ask("a", "x"))
            await other.hear_end_of("a")
            await other.say(Query(query_id=5, kind="arrivals"))
            await other.hear(until_count=len(other.heard) + 1)
            [arrival] = await operator.fetch_arrivals()
    refused = other.heard[-1]
    assert isinstance(refused, Refused)
    assert (refused.query_id, refused.code) == (5, "permission_denied")
    assert arrival.client == f"uid {NOBODY}/default"


async def test_as_many_as_there_are_fit_into_a_frame(tmp_path: Path) -> None:
    """With names of a usual length; the client's decoder takes no longer frame."""
    async with daemon(tmp_path) as (engine, path), connect(path) as client:
        fill(engine, f"uid 4294967295/{'n' * 40}")
        assert await client.fetch_arrivals() == engine.arrivals()
        assert len(engine.arrivals()) == MAX_ARRIVALS


async def test_of_those_with_the_longest_names_the_latest_fit(tmp_path: Path) -> None:
    """Where every name is as long as one may be the latest come, the first of them at 0, and the connection goes on."""
    async with daemon(tmp_path) as (engine, path), connect(path) as client, connected(path) as peer:
        fill(engine, f"uid 4294967295/{chr(0x10FFFF) * 256}")
        arrivals = await client.fetch_arrivals()
        assert len(arrivals) >= 2000
        assert [arrivals[0].arrival_s, arrivals[-1].prompt_tokens] == [0, MAX_ARRIVALS]
        assert arrivals == engine.arrivals(len(arrivals))
        await peer.say(HELLO, Query(query_id=1, kind="arrivals"))
        await peer.hear(until_count=2)
