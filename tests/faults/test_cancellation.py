"""Cancellation at every await of the runtime and of the client: each one, found in the source, not a sample."""

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from ferrum_rt.ipc import client as client_module
from ferrum_rt.runtime import runtime as runtime_module
from tests.faults.awaits import all_awaits
from tests.faults.cancelling import How, cancel_callers, cancel_clients, cancel_hosts
from tests.faults.clients import CLIENTS, CREDIT, counted_daemon
from tests.faults.scenarios import CALLERS, HOSTS, Scenario
from tests.faults.tracing import Tracer

# Awaits at which no task can be suspended, or into which no cancellation can come, and why.
_ENTER = "entering it suspends nobody"
_LEAVE = "leaving it suspends nobody"
_AT_ONCE = "the buffer of a new connection takes a greeting at once"
EXCUSED = {
    "ipc/client.py Client.__aenter__: async with AsyncExitStack() as stack: enter": _ENTER,
    "ipc/client.py Client.__aenter__: async with AsyncExitStack() as stack: exit": _LEAVE,
    "ipc/client.py Client._greet: await self._connection.send("
    "encode(Hello(version=VERSION, client='ferrum_rt')) + encode(_metrics_query()))": _AT_ONCE,
    "ipc/client.py Client.__aenter__: await stack.enter_async_context(anyio.create_task_group())": _ENTER,
    "ipc/client.py Client._run: async with anyio.create_task_group() as tasks: enter": _ENTER,
    "ipc/client.py Client.infer_batch: async with anyio.create_task_group() as tasks: enter": _ENTER,
    "ipc/client.py Client.infer_batch.run: async with limiter: exit": _LEAVE,
    "runtime/runtime.py Runtime.__aenter__: async with AsyncExitStack() as stack: enter": _ENTER,
    "runtime/runtime.py Runtime.__aenter__: await stack.enter_async_context(Worker('ferrum-executor', self._lag))": _ENTER,
    "runtime/runtime.py Runtime.__aenter__: await stack.enter_async_context(Worker('ferrum-tokenizer', self._lag))": _ENTER,
    "runtime/runtime.py Runtime.__aenter__: await stack.enter_async_context(Worker('ferrum-grammar-compiler', self._lag))": (
        _ENTER
    ),
    "runtime/runtime.py Runtime.__aenter__: await stack.enter_async_context(anyio.create_task_group())": _ENTER,
    "runtime/runtime.py Runtime._run: async with anyio.create_task_group() as tasks: enter": _ENTER,
    "runtime/runtime.py Runtime.infer_batch: async with anyio.create_task_group() as tasks: enter": _ENTER,
    "runtime/runtime.py Runtime.infer_batch.run: async with limiter: exit": _LEAVE,
}

TRACER = Tracer()  # of all tests here: one asks it what was cancelled
NUM_RUNS = 2 * len(CALLERS) + 4 * len(HOSTS) + 2 * len(CLIENTS)
pytestmark = [
    pytest.mark.slow,
    # asyncio cancels a task that has not begun by never running what it was made of.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that does not read is not waited for as long as usual, credit is given sooner, and the detokenizer
    yields more often."""
    monkeypatch.setattr(client_module, "CREDIT", CREDIT)
    monkeypatch.setattr(client_module, "GOODBYE_LIMIT_S", 0.003)
    monkeypatch.setattr(runtime_module, "_DETOKENIZE_AT_ONCE", 2)


@pytest.fixture
async def tracer() -> AsyncIterator[Tracer]:
    """Follows every task that is made from here on."""
    TRACER.num_runs += 1
    loop = asyncio.get_running_loop()
    loop.set_task_factory(TRACER.factory)
    yield TRACER
    loop.set_task_factory(None)


def each(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", scenarios, ids=str)


@each(CALLERS)
@pytest.mark.parametrize("how", ["scope", "task"])
async def test_a_caller_cancelled_at_any_await(scenario: Scenario, how: How, tracer: Tracer) -> None:
    """Cancelled whenever it or any task of the engine is suspended: one end for each request, no page held, the ledger
    right, and the next request's text right."""
    assert await cancel_callers(scenario, how, tracer, own=True) > 5


@each(HOSTS)
@pytest.mark.parametrize("how", ["scope", "task", "all", "task again"])
async def test_a_host_cancelled_at_any_await(scenario: Scenario, how: How, tracer: Tracer) -> None:
    """Cancelled from start-up to drain: no thread, task, descriptor or page is left, and the executor is closed; also where
    asyncio cancels every task there is, or the same one again and again."""
    assert await cancel_hosts(scenario, how, tracer, own=how != "task again") > 5
    if how == "all":
        gc.collect()  # what was never awaited says so now, where it is expected


@each(CLIENTS)
@pytest.mark.parametrize("how", ["scope", "task"])
async def test_a_client_cancelled_at_any_await(scenario: Scenario, how: How, tracer: Tracer, tmp_path: Path) -> None:
    """Connecting, asking, reading or leaving: the daemon's engine has nothing of it left, and neither has this process."""
    async with counted_daemon(tmp_path / "s") as engine:
        assert await cancel_clients(scenario, how, tracer, tmp_path / "s", engine) > 2


def test_every_await_was_cancelled() -> None:
    """A cancellation came into each await of the runtime and the client in the tests before this one; a new await needs a
    scenario, or a reason why none can reach it."""
    if TRACER.num_runs < NUM_RUNS:
        pytest.skip("it asks what all the tests before it have done")
    assert sorted(all_awaits() - TRACER.cancelled) == sorted(EXCUSED)


@each(CALLERS)
def test_a_caller_on_trio(scenario: Scenario) -> None:
    """The same where the event loop is trio's, at each suspension of the caller's."""
    assert anyio.run(_on_trio, scenario, backend="trio") >= 1


@each(HOSTS)
def test_a_host_on_trio(scenario: Scenario) -> None:
    """The same for a host on trio."""

    async def run() -> int:
        return await cancel_hosts(scenario, "scope", Tracer(), own=False)

    assert anyio.run(run, backend="trio") > 5


async def _on_trio(scenario: Scenario) -> int:
    return await cancel_callers(scenario, "scope", Tracer(), own=False)
