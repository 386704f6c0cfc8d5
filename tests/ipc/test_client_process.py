"""What a program that only talks to a daemon loads, and how much memory it takes."""

import json
import os
import sys
from pathlib import Path

import anyio
import pytest

from tests.fakes.daemon import ROOT, daemon_process
from tests.runtime.engines import text_after

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
