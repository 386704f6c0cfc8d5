"""Opening runtimes for tests: with the fake executor, and with every step checked."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.runtime.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.executor import FakeExecutor, fake_model


@asynccontextmanager
async def fake_engine(config: dict[str, Any] | None = None, **fake: Any) -> AsyncIterator[tuple[Runtime, FakeExecutor]]:
    """A runtime over a FakeExecutor built with the ``fake`` arguments."""
    engine_config = build_config(None, None, config or {})
    executor = FakeExecutor(engine_config, **fake)

    def load(config: EngineConfig) -> LoadedModel:
        return fake_model(config, executor)

    async with Runtime(engine_config, load) as engine:
        yield engine, executor
