"""Runtimes over the fake executor, what they answer, and waiting for what they do."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.simulation.digests import expected_tokens
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


def text_after(prompt: str, count: int, *, sample: int = 0) -> str:
    return bytes(expected_tokens(prompt.encode(), count, sample=sample)).decode()


async def until(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until ``condition`` holds."""
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()
