"""The command line as its users meet it. In-process where that shows as much; as a process of its own where signals, pipes
and imports matter."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

import ferrum_rt
from ferrum_rt import ChatMessage, InferenceResponse
from ferrum_rt.cli.chat import HELP
from ferrum_rt.kernels.cpu.build import TARGETS
from tests.command_line import FERRUM_RT, LIMIT_S, Cli, Result, assert_one_error, read_byte, read_until, start

# So hot that every token is as likely as any other: a text that goes on until it is stopped.
ENDLESS = ["--temperature", "100", "--max-tokens", "900"]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


# -- run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_prints_what_json_reports(cli: Cli) -> None:
    """The same seed gives the same text, as a stream after its prompt and as one JSON object."""
    arguments = ("run", "class Queue:", "--max-tokens", "16", "--seed", "3")

    streamed, as_json = cli(*arguments), cli(*arguments, "--json")

    report = json.loads(as_json.out)
    assert (streamed.status, as_json.status, as_json.err) == (0, 0, "")
    assert streamed.out == f"class Queue:{report['text']}\n"
    assert (report["model"], report["prompt"]) == ("demo", "class Queue:")
    assert report["usage"]["completion_tokens"] == len(report["token_ids"]) > 1
    counts = rf"prompt tokens: {report['usage']['prompt_tokens']}, output tokens: {len(report['token_ids'])}"
    speed = r"time to first token: \d+\.\d+ s, tokens/s: \d+\.\d"
    assert re.fullmatch(rf"{counts}, {speed}, finish reason: {report['finish_reason']}\n", streamed.err)


@pytest.mark.slow
def test_run_reads_the_prompt_from_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt - stands for all of standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\nimport "))

    result = cli("run", "-", "--max-tokens", "2")

    assert result.status == 0
    assert result.out.startswith("import os\nimport ")


@pytest.mark.slow
def test_stop_strings_end_the_text(cli: Cli) -> None:
    """--stop takes several strings, and the text ends before the first that comes."""
    arguments = ("run", "def main", "--max-tokens", "16", "--temperature", "100", "--seed", "1")
    whole = json.loads(cli(*arguments, "--json").out)["text"]
    letters = [character for character in whole if character.isalpha()]
    later, sooner = letters[-1], letters[len(letters) // 2]

    cut = cli(*arguments, "--stop", later, sooner)

    end = min(whole.index(later), whole.index(sooner))
    assert cut.out == f"def main{whole[:end]}\n"
    assert cut.err.endswith("finish reason: stop\n")


@pytest.mark.slow
def test_options_overrule_the_configuration_file(cli: Cli, tmp_path: Path) -> None:
    """What the file says holds, but for what the command line says."""
    config = tmp_path / "engine.toml"
    config.write_text('[sampling]\nmax_tokens = 3\n[backend]\ndevice = "cuda"\n')
    engine = ["--device", "cpu", "--dtype", "float32", "--kv-dtype", "int8", "--load-format", "dummy"]

    result = cli("run", "def", "--config", str(config), *engine, "--temperature", "0", "--json")

    assert result.status == 0, result.err
    assert len(json.loads(result.out)["token_ids"]) == 3


@pytest.mark.slow
def test_interrupting_a_run_ends_it_quietly() -> None:
    """Ctrl-C in the middle of a stream: status 130 and nothing on standard error."""
    with start("run", "def", *ENDLESS) as process:
        assert read_byte(process) == b"d"  # the text comes while it is generated

        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)

    assert (process.returncode, err) == (130, b"")


@pytest.mark.slow
def test_a_closed_pipe_ends_a_run_quietly() -> None:
    """When the reader goes away (| head), the run ends without a word."""
    with start("run", "def", *ENDLESS) as process:
        assert read_byte(process) == b"d"
        assert process.stdout is not None

        process.stdout.close()
        process.wait(timeout=LIMIT_S)

        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (141, b"")


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("walk", "invalid choice: 'walk'"),
        ("run", "the following arguments are required: PROMPT"),
        ("run def --max-token 3", "unrecognized arguments: --max-token 3"),
        ("run def --top-k many", "--top-k: invalid int value: 'many'"),
        ("run def --dtype float7", "--dtype: invalid choice: 'float7'"),
        ("run def --stop", "--stop: expected at least one argument"),
        ("run def --temperature -1", "temperature: must be between 0 and 100"),
        ("run def --temperature nan", "temperature: must be between 0 and 100"),
        ("chat --max-tokens 0", "max_tokens: must be between 1 and"),
    ],
)
def test_wrong_arguments_get_one_line(cli: Cli, arguments: str, message: str) -> None:
    """Exactly one line says what is wrong, and the status is 2."""
    result = cli(*arguments.split())

    assert_one_error(result)
    assert message in result.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[[[", "not valid TOML"),
        ("[schedular]", "did you mean 'scheduler'?"),
        ("[kv_cache]\nblok_size = 16", "did you mean 'block_size'?"),
        ("[kv_cache]\nblock_size = 0", "kv_cache.block_size must be at least 1"),
    ],
)
def test_a_bad_configuration_file_gets_one_line(cli: Cli, tmp_path: Path, content: str | None, message: str) -> None:
    """Exactly one line names the file and what is wrong in it, and the status is 2."""
    path = tmp_path / "engine.toml"
    if content is not None:
        path.write_text(content)

    result = cli("run", "def", "--config", str(path))

    assert_one_error(result)
    assert str(path) in result.err
    assert message in result.err


@pytest.mark.slow
@pytest.mark.parametrize("command", [["run", "def"], ["run", "def", "--json"], ["chat"]])
def test_a_directory_without_a_model_gets_one_line(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    """Exactly one line names the file that is missing, and the status is 2."""
    result = cli(*command, "--model", str(tmp_path))

    assert_one_error(result)
    assert str(tmp_path / "config.json") in result.err


@pytest.mark.slow
def test_a_missing_model_gets_one_line_from_the_real_process(tmp_path: Path) -> None:
    """As a process too there is one line on standard error and no traceback."""
    path = tmp_path / "nothing"
    process = subprocess.run(
        [*FERRUM_RT, "run", "def", "--model", str(path)], capture_output=True, text=True, timeout=LIMIT_S
    )

    assert_one_error(Result(process.returncode, process.stdout, process.stderr))
    assert process.stderr == f"ferrum-rt: error: {path}: no such directory\n"


def test_help_imports_no_torch() -> None:
    """--help and --version answer without loading torch, and end with status 0."""
    script = (
        "import sys\n"
        "from ferrum_rt.cli import main\n"
        "for option in ('--help', '--version'):\n"
        "    try:\n"
        "        main([option])\n"
        "    except SystemExit as done:\n"
        "        assert not done.code\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_S)

    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("usage: ferrum-rt")
    assert process.stdout.endswith(f"ferrum-rt {ferrum_rt.__version__}\n")


# -- chat -----------------------------------------------------------------------------------------------------------------


async def converse(*questions: str, **fields: float) -> list[str]:
    """The answers to questions that each come with those before them."""
    history: list[ChatMessage] = []
    async with ferrum_rt.open_runtime() as engine:
        for question in questions:
            history.append(ChatMessage(role="user", content=question))
            params = ferrum_rt.SamplingParams(
                max_tokens=int(fields["max_tokens"]), temperature=fields["temperature"], seed=int(fields["seed"])
            )
            response: InferenceResponse = await engine.infer(history, sampling_params=params)
            history.append(ChatMessage(role="assistant", content=response.text))
    return [message.content for message in history[1::2]]


@pytest.mark.slow
def test_chat_over_a_pipe_prints_answers_alone() -> None:
    """Each answer is given with the conversation in mind until /reset, and ended by the end of the input."""
    with start("chat", "--max-tokens", "12", "--temperature", "1", "--seed", "5") as process:
        out, err = process.communicate(b"hello\n\nhello\n/reset\nhello\n", timeout=LIMIT_S)

    first, second = anyio.run(lambda: converse("hello", "hello", max_tokens=12, temperature=1.0, seed=5))
    assert first != second
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == f"{first}\n{second}\n{first}\n"


@pytest.mark.slow
def test_interrupting_a_chat_cancels_the_answer_alone() -> None:
    """Ctrl-C cuts the answer that is being given; the next question is answered in full."""
    with start("chat", "--max-tokens", "100", "--temperature", "100", "--seed", "5") as process:
        assert process.stdin is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        begun = read_byte(process)

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/reset\nhello\n/exit\nhello\n", timeout=LIMIT_S)

    [whole] = anyio.run(lambda: converse("hello", max_tokens=100, temperature=100.0, seed=5))
    text = (begun + out).decode()
    assert (process.returncode, err) == (0, b"")
    assert text.endswith(f"\n{whole}\n")
    cut = text.removesuffix(f"\n{whole}\n")
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


@pytest.mark.slow
def test_chat_on_a_terminal_prompts_until_it_is_left() -> None:
    """On a terminal there is a prompt; Ctrl-C there says how to leave, and Ctrl-D leaves."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb+", buffering=0) as terminal:
        with start("chat", terminal=theirs) as process:
            os.close(theirs)
            read_until(terminal, b">>> ")
            process.send_signal(signal.SIGINT)
            read_until(terminal, b">>> ")
            terminal.write(b"\x04")
            _, err = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 0
    assert err.decode().strip() == HELP


# -- doctor ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_reports_and_tries_the_model(cli: Cli) -> None:
    """The JSON object holds the versions, the machine and a passed self test; the text says the same."""
    as_json, as_text = cli("doctor", "--json"), cli("doctor")

    report = json.loads(as_json.out)
    assert (as_json.status, as_json.err, as_text.status, as_text.err) == (0, "", 0, "")
    assert set(report["versions"]) == {"python", "ferrum_rt", "torch", "tokenizers", "msgspec", "anyio", "uvloop"}
    assert report["versions"]["ferrum_rt"] == ferrum_rt.__version__
    assert report["cores"] >= 1
    assert (report["cuda_lacks"] or "can be used") in as_text.out
    assert set(report["cuda_tools"]) == {"nvcc", "ninja"}
    assert report["memory_total"] > report["memory_available"] > 0
    kernels = report["cpu_kernels"]
    assert (f"native, {kernels['instruction_set']}: {kernels['library']}" if kernels else "torch's") in as_text.out
    assert report["self_test"]["ok"] is True
    assert report["cpu"] in as_text.out
    assert repr(report["self_test"]["text"]) in as_text.out


@pytest.mark.slow
def test_doctor_fails_where_the_model_does(cli: Cli, tmp_path: Path) -> None:
    """A model that cannot be loaded is a line of the report, and the status is 1."""
    as_json, as_text = cli("doctor", "--json", "--model", str(tmp_path)), cli("doctor", "--model", str(tmp_path))

    error = json.loads(as_json.out)["self_test"]["error"]
    assert (as_json.status, as_text.status, as_text.err) == (1, 1, "")
    assert str(tmp_path / "config.json") in error
    assert f"failed: {error}" in as_text.out


def test_doctor_builds_only_what_it_is_told(cli: Cli) -> None:
    """A target that there is not is an error that names those there are, and so is a target with nothing to build."""
    unknown, idle = cli("doctor", "--build", "--target", "x86-64-v9"), cli("doctor", "--target", "x86-64")

    assert_one_error(unknown)
    assert_one_error(idle)
    assert f"'x86-64-v9' is none of {', '.join(TARGETS)}" in unknown.err
    assert "--build" in idle.err
