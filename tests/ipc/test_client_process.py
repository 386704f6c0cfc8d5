"""What a program that only talks to a daemon loads, and how much memory it takes."""

import json
import os
import sys
from pathlib import Path

import anyio
import pytest

from tests.daemon.serving import server
from tests.fakes.daemon import ROOT, daemon_process
from tests.runtime.engines import text_after, until

CLIENT = """
import json, sys
import ferrum_rt
ferrum_rt.connect
import anyio

async def answer():
    async with ferrum_rt.connect(sys.argv[1]) as engine:
        async with engine.infer_stream("light", max_tokens=100) as chunks:
            return "".join([chunk.text async for chunk in chunks])

text = anyio.run(answer)
with open("/proc/self/status") as status:
    [peak] = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
print(json.dumps([text, peak * 1024, sorted(sys.modules)]))
"""
HEAVY = {"torch", "numpy", "tokenizers", "safetensors", "jinja2", "llguidance", "transformers", "opentelemetry.sdk"}


@pytest.mark.slow
async def test_a_client_process_is_light(tmp_path: Path) -> None:
    """A program that streams an answer through ``ferrum_rt.connect`` loads nothing of weight and no engine of ours, and
    never holds more than 60 MB of memory."""
    async with daemon_process(tmp_path / "s"):
        command = [sys.executable, "-W", "error", "-c", CLIENT, str(tmp_path / "s")]
        done = await anyio.run_process(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr.decode()
    text, peak, loaded = json.loads(done.stdout)
    assert text == text_after("light", 100)
    assert not HEAVY & set(loaded)
    assert not [name for name in loaded if name.startswith(("ferrum_rt.runtime", "ferrum_rt.kernels", "ferrum_rt.daemon"))]
    assert peak < 60e6


STREAMS = """
import sys
import anyio, ferrum_rt

async def read(engine, number):
    async with engine.infer_stream(str(number), max_tokens=900) as chunks:
        async for _ in chunks:
            pass

async def main():
    async with ferrum_rt.connect(sys.argv[1]) as engine, anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(read, engine, number)

anyio.run(main)
"""


@pytest.mark.slow
async def test_a_killed_client_gives_its_pages_back_within_two_steps(tmp_path: Path) -> None:
    """SIGKILL leaves it no time to say anything; the daemon hears of it from the kernel."""
    async with server(tmp_path, step_s=0.03) as (engine, path, _):
        command = [sys.executable, "-c", STREAMS, str(path)]
        async with await anyio.open_process(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
            await until(lambda: engine.status_now().requests.running == 3)
            process.kill()
            await process.wait()
            steps = engine.metrics().steps
            await until(lambda: engine.status_now().pages.active == 0)
            assert engine.metrics().steps - steps <= 2
        assert engine.status_now().requests.cancelled == 3
