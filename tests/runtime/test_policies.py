"""What a user sets: limits of clients, changes while the engine runs, deadlines of scopes, pressure."""

import anyio
import pytest

from ferrum_rt.interfaces.errors import ConfigError, DeadlineExceeded, ResourceExhausted
from ferrum_rt.interfaces.types import ClientId, MemoryPressure
from tests.runtime.engines import fake_engine, text_after, until


async def test_a_client_has_so_many_requests_and_no_more() -> None:
    """One more is refused at once with a time after which to come again, another client's is not; and there is room again
    when one has ended."""
    config = {"scheduler": {"clients": {"small": {"max_requests": 1}}}}
    async with fake_engine(config, step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", client_id=ClientId("small"), max_tokens=500) as chunks:
            await anext(aiter(chunks))
            with pytest.raises(ResourceExhausted, match="client 'small' has 1 requests") as caught:
                await engine.infer("y", client_id=ClientId("small"))
            assert caught.value.retry_after is not None
            assert caught.value.retry_after > 0
            assert (await engine.infer("y", client_id=ClientId("other"), max_tokens=3)).text == text_after("y", 3)
        assert (await engine.infer("y", client_id=ClientId("small"), max_tokens=3)).text == text_after("y", 3)
        assert (await engine.status()).requests.rejected == 1


async def test_limits_can_be_changed_while_it_runs() -> None:
    """What is admitted next is judged by the new limits, ``config`` shows them, and a wrong one changes nothing."""
    async with fake_engine(step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", client_id=ClientId("a"), max_tokens=500) as chunks:
            await anext(aiter(chunks))
            engine.reconfigure(clients={"a": {"max_requests": 1}})
            with pytest.raises(ResourceExhausted):
                await engine.infer("y", client_id=ClientId("a"))
            for wrong in ({"max_running_requests": 3}, {"max_waiting_requests": 10**6}, {"clients": {"a": {"weight": 0}}}):
                with pytest.raises(ConfigError, match="scheduler"):
                    engine.reconfigure(**wrong)
            assert engine.config.scheduler.clients["a"].max_requests == 1
            engine.reconfigure(clients={})
            await engine.infer("y", client_id=ClientId("a"), max_tokens=3)


async def test_the_deadline_of_a_scope_is_the_requests() -> None:
    """A request under a cancel scope is scheduled with the scope's deadline: waiting for a slot, it goes before one that
    came earlier without."""
    order = []
    async with fake_engine({"scheduler": {"max_running_requests": 1}}, step_s=0.001) as (engine, _):
        async with anyio.create_task_group() as tasks:

            async def ask(prompt: str, limit: float | None) -> None:
                with anyio.move_on_after(limit):
                    await engine.infer(prompt, max_tokens=20)
                    order.append(prompt)

            async with engine.infer_stream("x", max_tokens=300) as chunks:
                await anext(aiter(chunks))
                tasks.start_soon(ask, "late", None)
                await until(lambda: engine.metrics().scheduler.waiting == 1)
                tasks.start_soon(ask, "due", 20.0)
                await until(lambda: engine.metrics().scheduler.waiting == 2)
                async for _ in chunks:
                    pass
    assert order == ["due", "late"]


async def test_a_deadline_of_its_own_goes_before_the_scopes() -> None:
    """A request that says its deadline keeps it."""
    async with fake_engine({"scheduler": {"max_running_requests": 1}}, step_s=0.002) as (engine, _):
        async with engine.infer_stream("x", max_tokens=400) as chunks:
            await anext(aiter(chunks))
            with anyio.fail_after(20), pytest.raises(DeadlineExceeded):
                await engine.infer("y", deadline_s=0.02)


async def test_pressure_is_told() -> None:
    """Callbacks hear of each level that the pages reach, and one that raises keeps nobody else from it."""
    levels: list[MemoryPressure] = []

    def broken(pressure: MemoryPressure) -> None:
        raise ZeroDivisionError

    config = {"kv_cache": {"num_pages": 10, "block_size": 4}}
    async with fake_engine(config) as (engine, _):
        engine.on_memory_pressure(broken)
        engine.on_memory_pressure(levels.append)
        await engine.infer("x", max_tokens=38)
        await engine.infer("y", max_tokens=3)
    assert levels == [
        MemoryPressure.MODERATE,
        MemoryPressure.HIGH,
        MemoryPressure.CRITICAL,
        MemoryPressure.LOW,
    ]


async def test_diagnostics_show_who_has_what() -> None:
    """Each client with something under way is there with its slots, pages and service."""
    async with fake_engine(step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", client_id=ClientId("a"), max_tokens=100) as chunks:
            await anext(aiter(chunks))
            found = engine.diagnostics()
            client = found.clients[ClientId("a")]
            assert (client.num_live, client.num_running, client.num_waiting) == (1, 1, 0)
            assert client.num_pages == 1
            assert client.served["normal"] > 0
        assert not engine.diagnostics().clients


async def test_a_client_has_no_higher_priority_than_it_may() -> None:
    """A request that asks for a higher priority than its client's policy has gets that: it takes nobody's slot."""
    config = {"scheduler": {"max_running_requests": 1, "clients": {"pushy": {"max_priority": "normal"}}}}
    async with fake_engine(config, step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", max_tokens=30) as chunks:
            await anext(aiter(chunks))
            async with engine.infer_stream("y", client_id=ClientId("pushy"), priority="critical", max_tokens=3) as others:
                await until(lambda: engine.metrics().scheduler.waiting == 1)
                assert engine.diagnostics().waiting["normal"] == 1
                assert "".join([chunk.text async for chunk in others]) == text_after("y", 3)
        assert engine.metrics().scheduler.preemptions == 0
