"""What the daemon's scheduler says of its clients: who is told, what is counted, and how much fits into a frame."""

import os
from pathlib import Path

import pytest

from ferrum_rt.interfaces.errors import PermissionDenied
from ferrum_rt.interfaces.types import ClientDiagnostics, ClientId, SchedulerDiagnostics
from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.messages import Query, Refused
from tests.daemon.serving import daemon, server
from tests.daemon.test_quotas import NOBODY, US, as_root, connected_as, open_directory
from tests.daemon.test_session import HELLO, ask, connected
from tests.runtime.engines import until
from tests.runtime.scheduling.schedules import Schedule

__all__ = ["open_directory"]  # a fixture


def generated(schedule: Schedule) -> dict[str, int]:
    return {name: client.generated_tokens for name, client in schedule.scheduler.diagnostics().clients.items()}


def test_each_clients_tokens_are_counted() -> None:
    """All that were generated for it, of all its requests and samples, those before a preemption included; together they are
    what the scheduler has counted for all."""
    schedule = Schedule(num_slots=3, num_pages=9, prefix_caching=False)
    for number in range(3):
        schedule.submit(f"a{number}", client="a", max_tokens=20)
    schedule.submit("b", client="b", max_tokens=20, num_samples=2)
    while len(generated(schedule)) < 2 or min(generated(schedule).values()) < 15:
        assert schedule.step()
        assert generated(schedule) == {name: schedule.served[ClientId(name)] for name in generated(schedule)}
    assert schedule.scheduler.statistics().preemptions > 0
    assert sum(generated(schedule).values()) == schedule.scheduler.statistics().generated_tokens


def test_a_client_that_comes_back_is_counted_anew() -> None:
    """Nothing is kept of who has nothing under way, so that memory does not grow with the names that were ever used."""
    schedule = Schedule()
    schedule.submit("stays", client="stays", max_tokens=200)
    schedule.submit("first", client="goes", max_tokens=30)
    while generated(schedule).get("goes", 30) < 29:
        assert schedule.step()
    while "goes" in generated(schedule):
        assert schedule.step()
    schedule.submit("second", client="goes", max_tokens=30)
    assert generated(schedule)["goes"] == 0


async def test_the_operator_is_told_of_all_clients(tmp_path: Path) -> None:
    """The client's report is the engine's own, of all users, under the names that the scheduler knows."""
    async with daemon(tmp_path, step_s=0.001) as (engine, path), connect(path) as client:
        assert (await client.fetch_diagnostics()).clients == {}
        async with (
            engine.infer_stream("here", max_tokens=900) as here,
            client.infer_stream("there", max_tokens=900, client_id=ClientId("ada")) as there,
        ):
            await anext(aiter(here))
            await anext(aiter(there))
            found = await client.fetch_diagnostics()
    assert sorted(found.clients) == ["default", f"uid {os.getuid()}/ada"]
    for one in found.clients.values():
        assert (one.num_live, one.num_running, one.num_waiting) == (1, 1, 0)
        assert one.generated_tokens > 0


async def test_nobody_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the daemon serves but who does not run it is PermissionDenied, and is served as before."""
    async with daemon(tmp_path) as (_, path), connect(path) as client:
        monkeypatch.setattr(os, "geteuid", lambda: US + 1)
        with pytest.raises(PermissionDenied, match="diagnostics"):
            await client.fetch_diagnostics()
        assert (await client.status()).requests.finished == 0


@as_root
async def test_another_user_is_not_told(open_directory: Path) -> None:
    """Not of its own requests either; and the one who runs the daemon is."""
    async with server(open_directory, uids=(US, NOBODY), step_s=0.001) as (engine, path, _):
        path.chmod(0o666)
        async with connected_as(path, NOBODY) as other, connect(path) as operator:
            await other.say(HELLO, ask("a", "x", max_tokens=900))
            await until(lambda: bool(engine.diagnostics().clients))
            await other.say(Query(query_id=5, kind="diagnostics"))
            while not any(isinstance(message, Refused) for message in other.heard):
                await other.hear(until_count=len(other.heard) + 1)
            found = await operator.fetch_diagnostics()
    [refused] = [message for message in other.heard if isinstance(message, Refused)]
    assert (refused.query_id, refused.code) == (5, "permission_denied")
    assert list(found.clients) == [f"uid {NOBODY}/default"]


async def test_of_too_many_clients_those_with_the_most_pages_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their names are as long as names may be; the client's decoder takes no longer frame, and the connection goes
    on."""
    name, idle = chr(0x10FFFF) * 250, {"num_live": 1, "num_waiting": 1, "num_running": 0, "num_queued_tokens": 9}
    everyone = {
        ClientId(f"{name}{number}"): ClientDiagnostics(num_pages=number, served={}, generated_tokens=0, **idle)
        for number in range(10_000)
    }
    many = SchedulerDiagnostics(
        clients=everyone, waiting={}, step_cost=(0.0, 0.0, 0.0, 0.0), estimated_wait_s=0.0, on_trial=[]
    )
    async with daemon(tmp_path) as (engine, path), connect(path) as client, connected(path) as peer:
        monkeypatch.setattr(engine, "diagnostics", lambda: many)
        found = (await client.fetch_diagnostics()).clients
        assert len(found) >= 2000
        assert found == {one: everyone[one] for one in list(everyone)[-len(found) :]}
        await peer.say(HELLO, Query(query_id=1, kind="diagnostics"))
        await peer.hear(until_count=2)
