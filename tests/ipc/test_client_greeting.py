"""The client's first exchange, with a daemon that says all it has to say at once."""

import socket
from pathlib import Path

import anyio
import msgspec
import pytest

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import Cancelled
from ferrum_rt.interfaces.types import EngineMetrics, PageCounts, SchedulerStats
from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Failed, Limits, Report, Welcome

METRICS = EngineMetrics(
    steps=0,
    step_s=0.0,
    host_s=0.0,
    scheduler=SchedulerStats(
        running=0,
        waiting=0,
        parked=0,
        preemptions=0,
        prompt_tokens=0,
        cached_tokens=0,
        generated_tokens=0,
        pages=PageCounts(total=1, free=1, active=0, cached=0),
    ),
)
WELCOME = Welcome(
    version=1,
    model="m",
    limits=Limits(frame_bytes=4096, requests=8),
    config=msgspec.json.encode(EngineConfig()).decode(),
)
GREETING = encode(WELCOME) + encode(Report(query_id=0, content=msgspec.json.encode(METRICS).decode()))


async def test_what_comes_with_the_greeting_is_heard(tmp_path: Path) -> None:
    """A daemon that greets and ends in one breath: its client's requests get the reason, not ConnectionLost."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        async def greet_and_end() -> None:
            await anyio.wait_readable(listener)
            connection, _ = listener.accept()
            with connection:
                connection.sendall(GREETING + encode(Failed(code="cancelled", message="it ends")))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(greet_and_end)
            async with connect(path) as engine:
                with pytest.raises(Cancelled, match="it ends"):
                    await engine.infer("x")
