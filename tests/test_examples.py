"""The examples, run as a reader would run them."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import msgpack
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.fakes.daemon import daemon_process
from tests.load.serving import uvicorn
from tests.runtime.engines import text_after

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
LIMIT_S = 120


def run_example(name: str) -> str:
    """What it writes to standard output; it must succeed and write nothing else."""
    process = subprocess.run([sys.executable, f"examples/{name}"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """The Starlette application, served by uvicorn on a port that was free."""
    with uvicorn("--app-dir", "examples", "starlette_app:app") as (url, server):
        yield url
        server.terminate()
        assert server.stderr is not None
        log = server.stderr.read()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


@pytest.fixture
def client(server_url: str) -> Iterator[httpx.Client]:
    # A proxy from the environment would stand between the server and the client that hangs up.
    with httpx.Client(base_url=server_url, timeout=LIMIT_S, trust_env=False) as client:
        yield client


def test_outputs_prints_json_samples_and_an_own_rules_text() -> None:
    """The JSON meets its schema, three samples say what they began with, and the rule in Python was kept."""
    first, *samples, last = run_example("outputs.py").splitlines()

    assert re.fullmatch(r"\{'name': .*, 'size': \d+\}", first)
    assert len(samples) == 3
    assert all(re.search(r" began with .* at -?\d+\.\d\d; the likeliest were ", sample) for sample in samples)
    assert re.search(r" repeats nothing; the seed was \d+$", last)


def test_script_prints_an_answer_a_stream_and_a_batch() -> None:
    """All three ways to ask give text, and the bad prompt of the batch spoils only its own answer."""
    out = run_example("script.py")

    assert out.startswith("if __name__ ==")
    assert re.search(r"^-- \d+ tokens, ended by (length|eos)$", out, re.MULTILINE)
    assert "class Queue:" in out
    assert len(re.findall(r"^'.*' -> ['\"]", out, re.MULTILINE)) == 3
    assert len(re.findall(r"^\[123456789\]: request_validation_error: ", out, re.MULTILINE)) == 1


def test_two_clients_are_both_served() -> None:
    """Each client's answers and tokens are counted as its own, and none is left out."""
    header, *rows = run_example("two_clients.py").splitlines()

    assert header.split()[0] == "client"
    accounts = {name: [int(count) for count in counts] for name, *counts in (row.split() for row in rows)}
    answers, failures, prompt_tokens, output_tokens = accounts["editor"]
    assert answers + failures == 5  # on a slow machine a deadline can pass
    answers, failures, prompt_tokens, output_tokens = accounts["batch"]
    assert (answers, failures) == (12, 0)
    assert prompt_tokens > answers
    assert output_tokens >= answers


def test_starlette_app_streams_text(client: httpx.Client) -> None:
    """The text comes in pieces, and there is some."""
    with client.stream("POST", "/generate", json={"prompt": "class Queue:", "max_tokens": 16}) as response:
        pieces = list(response.iter_text())

    assert response.status_code == 200
    assert len(pieces) > 1
    assert "".join(pieces).strip()


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "priority": 3}, {"prompt": "x", "max_tokens": 0}])
def test_starlette_app_refuses_bad_requests(client: httpx.Client, body: dict[str, object]) -> None:
    """A request that is wrong gets status 400 and is told why."""
    response = client.post("/generate", json=body)

    assert response.status_code == 400
    assert response.json()["error"]


def test_starlette_app_says_what_went_wrong_half_way(client: httpx.Client) -> None:
    """An error that comes after the headers is told in the text."""
    response = client.post("/generate", json={"prompt": "x " * 2000})

    assert "[request_validation_error: prompt (" in response.text


def test_a_client_that_disconnects_cancels_its_generation(client: httpx.Client) -> None:
    """When the client hangs up, its request is counted as cancelled and its pages come free."""
    before = client.get("/status").json()["requests"]
    with client.stream("POST", "/generate", json={"prompt": "x", "max_tokens": 900, "temperature": 100}) as response:
        assert next(response.iter_text())
    # Left here, the connection is closed: most of the text was not read.

    status = client.get("/status").json()
    limit = time.monotonic() + LIMIT_S
    while status["requests"]["running"] and time.monotonic() < limit:
        status = client.get("/status").json()

    assert status["requests"]["cancelled"] == before["cancelled"] + 1
    assert status["requests"]["finished"] == before["finished"]
    assert status["pages"]["active"] == 0


async def plain_client(path: Path, *options: str) -> tuple[int, str, str]:
    """Its exit status, and what it wrote to standard output and standard error."""
    command = [sys.executable, "examples/plain_client.py", "--socket", str(path), *options]
    with anyio.fail_after(LIMIT_S):
        done = await anyio.run_process(command, cwd=ROOT, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("max_tokens", [1, 12, 200])
async def test_plain_client_prints_the_text(tmp_path: Path, max_tokens: int) -> None:
    """It prints what the model wrote, though that be far longer than the credit that it begins with."""
    path = tmp_path / "daemon.sock"
    async with daemon_process(path, step_s=0.001):
        status, out, err = await plain_client(path, "def main():", "--max-tokens", str(max_tokens), "--seed", "7")

    text, summary, _ = out.rsplit("\n", 2)
    assert (status, err) == (0, "")
    assert text == text_after("def main():", max_tokens)
    assert summary == f"-- {max_tokens} tokens, ended by length; the seed was 7"


async def test_plain_client_reports_and_answers_a_chat(tmp_path: Path) -> None:
    """The status comes as JSON, and before the answer where both are asked for."""
    path = tmp_path / "daemon.sock"
    async with daemon_process(path, step_s=0.001):
        status, out, err = await plain_client(path, "--status")
        assert (status, err) == (0, "")
        assert json.loads(out)["requests"]["finished"] == 0

        status, out, err = await plain_client(path, "Who are you?", "--chat", "--max-tokens", "8", "--status")
    report, end, answer = out.partition("\n}\n")
    assert (status, err) == (0, "")
    assert json.loads(report + end)["state"] == "ready"
    assert re.fullmatch(r".{8}\n-- 8 tokens, ended by length; the seed was \d+\n", answer)


async def test_plain_client_says_what_is_wrong(tmp_path: Path) -> None:
    """Where there is no daemon, and where the daemon refuses, it says so in a line and fails."""
    path = tmp_path / "daemon.sock"
    status, out, err = await plain_client(path, "x")
    assert (status, out) == (1, "")
    assert err == f"connection_lost: {path}: No such file or directory; is a daemon running there?\n"

    async with daemon_process(path, step_s=0.001):
        status, out, err = await plain_client(path, "x", "--temperature", "-1")
    assert (status, out.strip()) == (1, "")
    assert re.fullmatch(r"request_validation_error: temperature: .*\n", err)


@pytest.mark.parametrize("ended", ["client", "daemon"])
async def test_plain_client_ends_half_way(tmp_path: Path, ended: str) -> None:
    """At Ctrl-C the daemon is told that nobody waits any more; when the daemon dies the client says so."""
    path = tmp_path / "daemon.sock"
    command = [sys.executable, "examples/plain_client.py", "--socket", str(path), "def main():", "--max-tokens", "900"]
    with anyio.fail_after(LIMIT_S):
        async with daemon_process(path, step_s=0.01) as daemon, await anyio.open_process(command, cwd=ROOT) as client:
            assert client.stdout is not None
            assert client.stderr is not None
            out = await client.stdout.receive()
            if ended == "client":
                client.send_signal(signal.SIGINT)
            else:
                daemon.kill()
            out += b"".join([piece async for piece in client.stdout])
            err = b"".join([piece async for piece in client.stderr])
            status = await client.wait()
            if ended == "client":
                counts = json.loads((await plain_client(path, "--status"))[1])["requests"]

    text = out.decode().removesuffix("\n")
    assert 0 < len(text) < 900
    assert text == text_after("def main():", len(text))
    if ended == "client":
        assert (status, err) == (130, b"cancelled: cancelled by the client\n")
        assert (counts["running"], counts["cancelled"]) == (0, 1)
    else:
        assert (status, err) == (1, b"connection_lost: the daemon closed the connection\n")


async def test_the_protocol_pages_conversation_is_a_real_one(tmp_path: Path) -> None:
    """Sent the page's bytes, a daemon answers with the page's; only the clock's times differ, and its config is left out."""
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8").partition("## A conversation")[2]
    asked = [bytes.fromhex(line[2:]) for line in page.splitlines() if line.startswith("> ")]
    expected = [line[2:] for line in page.splitlines() if line.startswith("< ")]

    path = tmp_path / "daemon.sock"
    with anyio.fail_after(LIMIT_S):
        async with daemon_process(path, step_s=0.02), await anyio.connect_unix(path) as stream:
            *first, goodbye = asked
            await stream.send(b"".join(first))
            answer = BufferedByteReceiveStream(stream)
            frames: list[bytes] = []
            while not frames or msgpack.unpackb(frames[-1][4:])["type"] != "finished":
                head = await answer.receive_exactly(4)
                frames.append(head + await answer.receive_exactly(int.from_bytes(head, "little")))
            await stream.send(goodbye)
            with pytest.raises(anyio.EndOfStream):
                await answer.receive()

    assert len(frames) == len(expected)
    welcome, *others, finished = frames
    assert welcome[4:].startswith(bytes.fromhex(expected[0].removesuffix("…"))[4:-3])
    assert others == [bytes.fromhex(line) for line in expected[1:-1]]
    times = bytes.fromhex(expected[-1])
    assert len(finished) == len(times)
    assert msgpack.unpackb(finished[4:]).keys() == msgpack.unpackb(times[4:]).keys()


async def test_shared_model_is_the_daemons_or_an_own_one(tmp_path: Path) -> None:
    """With a daemon it prints what the daemon's model says; without one it says so, and prints what its own does."""
    path = tmp_path / "daemon.sock"
    command = [sys.executable, "examples/shared_model.py", str(path)]
    with anyio.fail_after(LIMIT_S):
        alone = await anyio.run_process(command, cwd=ROOT)
        async with daemon_process(path):
            shared = await anyio.run_process(command, cwd=ROOT)

    assert b"no daemon listens" in alone.stderr
    assert len(alone.stdout.splitlines()) >= 2
    assert (shared.stderr, shared.stdout.decode().split("\n--")[0]) == (b"", text_after("def read_lines(", 48))
