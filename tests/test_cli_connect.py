"""The commands that talk to a daemon: run and chat with --connect, and status. The daemon is a process of its own, over the
fake executor, wherever the test does not have to reach into it."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
import pytest

from ferrum_rt.cli import main
from ferrum_rt.cli.status import Report
from ferrum_rt.interfaces.types import EngineState
from tests.command_line import LIMIT_S, Cli, Result, assert_one_error, read_until, start
from tests.daemon.serving import daemon
from tests.fakes.daemon import daemon_process
from tests.runtime.engines import text_after, until

pytestmark = pytest.mark.slow  # a daemon takes two seconds to start

# In the daemons of these tests a step takes 5 ms: whatever is done to a request of this length finds it under way.
LONG = ["--max-tokens", "900"]
STEP_S = 0.005


@contextmanager
def running_daemon(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """daemon_process for tests that are not async, as the command line is not."""
    with anyio.from_thread.start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(daemon_process(path, step_s=STEP_S)) as process:
            yield process


@pytest.fixture(scope="module")
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for XDG_RUNTIME_DIR, where the user's own daemon runs."""
    directory = tmp_path_factory.mktemp("run")
    with running_daemon(directory / "ferrum-rt" / "default.sock"):
        yield directory


@pytest.fixture
def path(runtime_directory: Path) -> str:
    return str(runtime_directory / "ferrum-rt" / "default.sock")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def read(process: subprocess.Popen[bytes], size: int) -> str:
    assert process.stdout is not None
    return process.stdout.read(size).decode()


def chat_prompt(*turns: str) -> str:
    """What the fake tokenizer makes of a conversation that the user began."""
    roles = ["user", "assistant"] * len(turns)
    return "".join(f"{role}: {turn}\n" for role, turn in zip(roles, turns, strict=False)) + "assistant: "


# -- run and chat ---------------------------------------------------------------------------------------------------------


def test_run_prints_what_the_daemon_answers(cli: Cli, path: str) -> None:
    """The same output as with a model in this process: a stream after its prompt, or one JSON object with the model."""
    arguments = ("run", "def", "--max-tokens", "20", "--seed", "3", "--connect", path)

    streamed, as_json = cli(*arguments), cli(*arguments, "--json")

    report, text = json.loads(as_json.out), text_after("def", 20)
    assert (streamed.status, as_json.status, as_json.err) == (0, 0, "")
    assert streamed.out == f"def{text}\n"
    assert (report["model"], report["prompt"], report["text"], report["seed"]) == ("fake", "def", text, 3)
    counts = r"prompt tokens: 3, output tokens: 20, time to first token: \d+\.\d+ s, tokens/s: \d+\.\d"
    assert re.fullmatch(rf"{counts}, finish reason: length\n", streamed.err)


@pytest.mark.parametrize("arguments", ["def --max-tokens 3 --connect", "def --connect --max-tokens 3"])
def test_connect_alone_is_the_users_own_daemon(
    cli: Cli, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """--connect may be last or stand before another option: then it is the default socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_directory))

    result = cli("run", *arguments.split())

    assert (result.status, result.out) == (0, f"def{text_after('def', 3)}\n")


def test_chat_keeps_the_conversation(cli: Cli, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question goes to the daemon with those before it and their answers."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))

    result = cli("chat", "--max-tokens", "10", "--connect", path)

    first = text_after(chat_prompt("one"), 10)
    second = text_after(chat_prompt("one", first, "two"), 10)
    assert result == Result(0, f"{first}\n{second}\n", "")


def test_a_request_that_the_daemon_refuses_is_one_line(cli: Cli, path: str) -> None:
    """What the daemon finds wrong with a request is reported as the engine's own finding would be."""
    result = cli("run", "def", "--max-tokens", "2000", "--connect", path)

    assert_one_error(result)
    assert "max_model_len" in result.err


def test_these_commands_load_no_torch(path: str) -> None:
    """Neither status nor run or chat with --connect load torch or any other part of an engine."""
    script = (
        "import sys\n"
        "from ferrum_rt.cli import main\n"
        "path = sys.argv[1]\n"
        "assert main(['status', '--socket', path]) == 0\n"
        "assert main(['run', 'def', '--max-tokens', '3', '--connect', path]) == 0\n"
        "assert main(['chat', '--max-tokens', '3', '--connect', path]) == 0\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'jinja2', 'llguidance', 'ferrum_rt.runtime', 'importlib.metadata'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, path], input="hello\n", capture_output=True, text=True, timeout=LIMIT_S
    )

    assert process.stderr.endswith("finish reason: length\n\n"), process.stderr
    assert process.stdout.endswith(f"\n{text_after(chat_prompt('hello'), 3)}\n")


def test_what_a_daemon_was_asked_can_be_simulated(cli: Cli, tmp_path: Path) -> None:
    """status --arrivals writes its latest requests, to a file or with - to standard output, and simulate takes them; before
    there are any, and where it cannot be written, that is one line."""
    socket, trace = str(tmp_path / "s"), tmp_path / "trace.jsonl"
    with running_daemon(tmp_path / "s"):
        assert_one_error(cli("status", "--socket", socket, "--arrivals", str(trace)))
        assert not trace.exists()
        for count in ("3", "4"):
            assert cli("run", "def", "--max-tokens", count, "--connect", socket).status == 0
        written, printed = (cli("status", "--socket", socket, "--arrivals", place) for place in (str(trace), "-"))
        assert_one_error(cli("status", "--socket", socket, "--arrivals", str(tmp_path)))

    assert (written, printed) == (Result(0, "", ""), Result(0, trace.read_text(), ""))
    simulated = json.loads(cli("simulate", "--trace", str(trace), "--json").out)
    [client] = simulated["clients"]
    assert (simulated["requests"], simulated["prompt_tokens"]) == (2, 6)
    assert (client["client"], client["output_tokens"]) == (f"uid {os.getuid()}/default", 7)


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run def", "chat"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "m"),
        ("--config", "f.toml"),
        ("--device", "cpu"),
        ("--dtype", "float32"),
        ("--kv-dtype", "int8"),
        ("--load-format", "dummy"),
    ],
)
def test_the_daemons_engine_cannot_be_configured_here(cli: Cli, command: str, option: str, value: str) -> None:
    """An option of the engine beside --connect is an error that names it, whether or not a daemon is there."""
    result = cli(*command.split(), option, value, "--connect", "/nowhere/s")

    assert_one_error(result)
    assert f"argument {option}: not with --connect" in result.err


@pytest.mark.parametrize("command", ["run def --connect", "run def --json --connect", "chat --connect", "status --socket"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", r"no daemon listens at \S+/nobody; start one with: ferrum-rt serve --socket \S+/nobody"),
        ("file", r"\S+/file: not a socket"),
        ("x" * 108, r"at most 107; give a shorter one"),
    ],
)
def test_a_path_without_a_daemon_gets_one_line(cli: Cli, tmp_path: Path, command: str, name: str, message: str) -> None:
    """Exactly one line says what is wrong with the path and what to do, and the status is 2."""
    (tmp_path / "file").write_text("not a socket")

    result = cli(*command.split(), str(tmp_path / name))

    assert_one_error(result)
    assert re.search(message, result.err), result.err


def test_a_daemon_that_dies_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """The text so far is printed, one line says that the connection is lost, and the status is 2."""
    with running_daemon(tmp_path / "s") as serving:
        with start("run", "def", *LONG, "--connect", str(tmp_path / "s")) as process:
            out = read(process, 20)
            serving.kill()
            rest, err = process.communicate(timeout=LIMIT_S)

    out += rest.decode()
    assert process.returncode == 2
    assert err.decode() == f"ferrum-rt: error: {tmp_path / 's'}: the daemon has closed the connection\n"
    assert out.endswith("\n")
    assert f"def{text_after('def', 900)}".startswith(out[:-1])
    assert len(out) < 900


def test_a_chat_ends_with_its_daemon(tmp_path: Path) -> None:
    """On a terminal, where other errors are reported and the prompt comes again, a lost connection ends the chat."""
    ours, theirs = pty.openpty()
    with running_daemon(tmp_path / "s") as serving, os.fdopen(ours, "rb+", buffering=0) as terminal:
        with start("chat", "--connect", str(tmp_path / "s"), terminal=theirs) as process:
            os.close(theirs)
            read_until(terminal, b">>> ")
            serving.kill()
            serving.wait()
            terminal.write(b"hello\n\x04")  # Ctrl-D, for a chat that would go on
            _, err = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 2
    assert err.decode().endswith("the daemon has closed the connection\n")


def test_interrupting_a_run_frees_its_pages(cli: Cli, path: str) -> None:
    """Ctrl-C ends the run quietly with status 130, and the daemon has cancelled the request."""
    before = report(cli, path).status.requests
    with start("run", "def", *LONG, "--connect", path) as process:
        assert read(process, 20) == f"def{text_after('def', 17)}"
        under_way = report(cli, path).status
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)

    assert (process.returncode, err) == (130, b"")
    assert (under_way.requests.running, under_way.pages.active > 0) == (1, True)
    deadline = time.monotonic() + 10
    while (after := report(cli, path).status).pages.active:  # the daemon may read our question before the other's goodbye
        assert time.monotonic() < deadline
    assert (after.requests.cancelled, after.requests.finished) == (before.cancelled + 1, before.finished)


# -- status ---------------------------------------------------------------------------------------------------------------


def report(cli: Cli, path: str) -> Report:
    result = cli("status", "--socket", path, "--json")
    assert (result.status, result.err) == (0, "")
    return msgspec.json.decode(result.out, type=Report)


def test_status_shows_what_json_reports(cli: Cli, path: str) -> None:
    """The JSON object has status, health and metrics; the table says the same, a line for each subject."""
    assert cli("run", "def", "--max-tokens", "20", "--connect", path).status == 0

    as_json, as_text = cli("status", "--socket", path, "--json"), cli("status", "--socket", path)

    assert set(json.loads(as_json.out)) == {"status", "health", "metrics"}
    shown = msgspec.json.decode(as_json.out, type=Report)
    requests, pages, tokens = shown.status.requests, shown.status.pages, shown.metrics.scheduler
    assert (shown.status.state, shown.health.healthy) == (EngineState.READY, True)
    assert requests.finished >= 1
    assert tokens.generated_tokens >= 20
    table = dict(re.split(" {2,}", line, maxsplit=1) for line in as_text.out.splitlines())
    assert (as_text.status, as_text.err) == (0, "")
    assert re.fullmatch(r"\d+\.\d s", table.pop("uptime"))
    assert table.pop("steps").startswith(f"{shown.metrics.steps}, executor {shown.metrics.step_s:.1f} s, host ")
    assert table == {
        "state": "ready",
        "model": "fake (llama, float32, cpu)",
        "requests": f"running 0, waiting 0, parked 0, finished {requests.finished}, "
        f"failed {requests.failed}, cancelled {requests.cancelled}, rejected 0",
        "pages": f"total {pages.total}, free {pages.free}, active 0, cached {pages.cached}",
        "memory": "weights 0.0 MiB, KV cache 0.0 MiB",
        "tokens": f"prompt {tokens.prompt_tokens}, cached {tokens.cached_tokens}, generated {tokens.generated_tokens}",
        **dict.fromkeys(shown.health.status.components, "ok"),
    }


def test_status_asks_the_users_own_daemon(cli: Cli, runtime_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --socket it is the default socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_directory))

    assert cli("status").status == 0


@pytest.mark.parametrize("option", [[], ["--json"]])
async def test_a_draining_daemon_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    """A daemon that lets its last requests finish is reported with its state, and the exit status is 1."""
    async with daemon(tmp_path, step_s=0.001) as (runtime, path), anyio.create_task_group() as tasks:
        async with runtime.infer_stream("def", max_tokens=900) as chunks:
            await anext(chunks)
            tasks.start_soon(runtime.shutdown)
            await until(lambda: runtime.status_now().state is EngineState.DRAINING)
            status = await anyio.to_thread.run_sync(main, ["status", "--socket", str(path), *option])

    out, err = capsys.readouterr()
    assert (status, err) == (1, "")
    assert "draining" in out


async def test_an_unhealthy_daemon_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong is told beside the component that it is wrong with, on one line, and the exit status is 1."""
    async with daemon(tmp_path, step_s=0.001) as (runtime, path):
        async with runtime.infer_stream("def", max_tokens=900) as chunks:
            await anext(chunks)
            runtime._cache._free.append(0)  # what only a bug could do
        await until(lambda: runtime.status_now().state is EngineState.FAILED)
        status = await anyio.to_thread.run_sync(main, ["status", "--socket", str(path)])

    out, err = capsys.readouterr()
    assert (status, err) == (1, "")
    assert re.search(r"^state +failed$", out, re.MULTILINE)
    assert re.search(r"^engine +not healthy: .*page ledger", out, re.MULTILINE)
    assert re.search(r"^tokenizer +ok$", out, re.MULTILINE)


def test_a_daemon_that_does_not_answer(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that hangs is an error after a while, so that who watches it by its status is told."""
    monkeypatch.setattr(sys.modules["ferrum_rt.cli.status"], "LIMIT_S", 0.1)  # by import it is the function
    with running_daemon(tmp_path / "s") as serving:
        serving.send_signal(signal.SIGSTOP)
        result = cli("status", "--socket", str(tmp_path / "s"))

    assert_one_error(result)
    assert "the daemon did not answer within 0.1 s" in result.err
