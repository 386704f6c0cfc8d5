"""ferrum-rt bench serve and sweep as their users meet them."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import ferrum_rt
from ferrum_rt.cli.bench import serve as bench_serve
from ferrum_rt.cli.bench import spans as bench_spans
from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.load.results import LoadResult, SweepResult
from ferrum_rt.load.shown import seconds
from ferrum_rt.load.spans import SpanRecorder, faults, request_trees
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from tests.command_line import FERRUM_RT, LIMIT_S, Cli, Result, assert_one_error, start
from tests.fakes.executor import FakeExecutor, fake_model
from tests.load.daemon import tracing_daemon
from tests.load.serving import openai_servers
from tests.test_cli_connect import report, running_daemon

SMALL = ("--prompt-tokens", "uniform:4,30", "--output-tokens", "6", "--warmup", "3")
SERVE = ("bench", "serve", "--requests", "12", "--concurrency", "3", *SMALL)
SWEEP = ("bench", "sweep", "--from", "40", "--duration", "0.2", "--ttft-slo", "0.05", *SMALL)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, recorder: SpanRecorder) -> None:
    """The engine that is opened in this process computes nothing, in steps of half a millisecond, and its spans are recorded
    without the process's own provider being set."""

    def load(config: EngineConfig) -> LoadedModel:
        return fake_model(config, FakeExecutor(config, step_s=0.0005))

    def open_runtime(*, config: EngineConfig) -> Runtime:
        return Runtime(config, load)

    monkeypatch.setattr(ferrum_rt, "open_runtime", open_runtime)
    monkeypatch.setattr(bench_serve, "record_spans", lambda: recorder)


def result_of(done: Result) -> LoadResult:
    assert (done.status, done.err) == (0, "")
    return msgspec.json.decode(done.out, type=LoadResult)


def assert_whole(result: LoadResult) -> None:
    """Every request came to its end, and has a tree of spans without a fault."""
    for repeat in result.repeats:
        trees = {tree.root.trace_id: tree for tree in request_trees(repeat.spans)}
        assert {record.trace_id for record in repeat.requests} == set(trees)
        assert [record.error for record in repeat.requests] == [None] * len(repeat.requests)
        assert [fault for tree in trees.values() for fault in faults(tree)] == []
    assert result.summary.spans_dropped == 0


def strip(result: LoadResult) -> dict[str, Any]:
    """Without what JSON on the terminal leaves out."""
    plain: dict[str, Any] = msgspec.to_builtins(result)
    for repeat in plain["repeats"]:
        repeat.update(requests=[], samples=[], spans=[])
    return plain


# -- serve, on an engine in this process ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_saved_is_all_and_what_is_printed_is_the_summary(fake: None, cli: Cli, tmp_path: Path) -> None:
    """The file has every request, with a whole tree of spans each, and samples of the engine; standard output the same but
    for those; both say what was sent to whom, and on what machine."""
    saved = tmp_path / "result.json"

    printed = result_of(cli(*SERVE, "--repeats", "2", "--seed", "5", "--json", "--save", str(saved)))

    result = msgspec.json.decode(saved.read_bytes(), type=LoadResult)
    assert_whole(result)
    assert msgspec.to_builtins(printed) == strip(result)
    assert [len(repeat.requests) for repeat in result.repeats] == [12, 12]
    assert all(record.output_tokens == 6 for repeat in result.repeats for record in repeat.requests)
    assert all(repeat.samples for repeat in result.repeats)
    assert result.summary.request_rate.margin is not None
    first, second = ([record.prompt_tokens for record in repeat.requests] for repeat in result.repeats)
    assert first != second
    assert result.target == "fake (llama, float32, cpu), in this process"
    assert result.load == {
        "requests": 12,
        "concurrency": 3,
        "prompt_tokens": "uniform:4,30",
        "output_tokens": "6",
        "seed": 5,
        "warmup": 3,
        "repeats": 2,
    }
    assert set(result.machine) >= {"cpu", "cores", "load_average", "python", "torch", "ferrum_rt"}


@pytest.mark.slow
def test_the_table_says_what_json_says(fake: None, cli: Cli, tmp_path: Path) -> None:
    """A line for each fact and a row for each quantity, made from the result that is saved."""
    saved = tmp_path / "result.json"

    text = cli(*SERVE, "--repeats", "3", "--ttft-slo", "10", "--save", str(saved)).out

    summary = msgspec.json.decode(saved.read_bytes(), type=LoadResult).summary
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in text.splitlines() if line and not line.startswith(" "))
    assert lines["requests"] == "36: completed 36"
    rate, margin = summary.goodput.mean, summary.goodput.margin
    assert lines["goodput"] == f"{rate:.4g} ± {margin:.2g} requests/s within TTFT 10 s"
    assert lines["spans"].endswith(", requests without 0")
    assert summary.ttft_s is not None
    assert seconds(summary.ttft_s.p99) in lines["TTFT"]
    assert len(re.findall(r"[\d.]+ (?:µs|ms|s)\b", lines["ITL"])) == 6


@pytest.mark.slow
def test_an_open_loop_by_duration(fake: None, cli: Cli, tmp_path: Path) -> None:
    """As many requests as come in that time at that rate, each due at its time, and good only within the limits."""
    saved = tmp_path / "result.json"
    arguments = ("--rate", "100", "--duration", "0.15", "--burstiness", "0", "--itl-slo", "0.0000001")

    printed = result_of(cli("bench", "serve", *SMALL, *arguments, "--json", "--save", str(saved)))

    [repeat] = msgspec.json.decode(saved.read_bytes(), type=LoadResult).repeats
    assert [record.due_s for record in repeat.requests] == pytest.approx([number / 100 for number in range(15)])
    assert (printed.summary.completed, printed.summary.goodput.mean) == (15, 0.0)
    assert (printed.load["rate"], printed.load["burstiness"], printed.limits.itl_s) == (100.0, 0.0, 1e-7)


def test_a_trace_is_put_on(fake: None, cli: Cli, tmp_path: Path) -> None:
    """Its requests, at its times, of its clients; the warm-up is of its requests too."""
    trace, saved = tmp_path / "trace.jsonl", tmp_path / "result.json"
    trace.write_text(
        '{"arrival_s": 0, "prompt_tokens": 9, "output_tokens": 3, "client": "ada"}\n'
        '{"arrival_s": 0.02, "prompt_tokens": 4, "output_tokens": 2}\n'
    )

    printed = result_of(cli("bench", "serve", "--trace", str(trace), "--warmup", "1", "--json", "--save", str(saved)))

    [repeat] = msgspec.json.decode(saved.read_bytes(), type=LoadResult).repeats
    assert [(r.client, r.due_s, r.prompt_tokens, r.output_tokens) for r in repeat.requests] == [
        ("ada", 0.0, 9, 3),
        ("default", 0.02, 4, 2),
    ]
    assert (printed.load["requests"], printed.load["trace"]) == (2, str(trace))


def test_where_nobody_is_served_the_status_is_1(fake: None, cli: Cli, tmp_path: Path) -> None:
    """Every request failed: there is a report all the same, with the errors and no times."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 900, "output_tokens": 100, "deadline_s": 0.000001}\n')

    done = cli("bench", "serve", "--trace", str(trace), "--warmup", "0")

    assert (done.status, done.err) == (1, "")
    assert "1: completed 0, deadline_exceeded 1" in done.out
    assert re.search(r"^TTFT( +-){6}$", done.out, re.MULTILINE)


@pytest.mark.slow
def test_progress_is_one_line_on_a_terminal(fake: None, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how far the run is, and is gone at the end; it is on standard error, which otherwise stays empty."""
    assert cli(*SERVE).err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    drawn = cli(*SERVE, "--repeats", "2").err

    assert "\n" not in drawn
    assert "\r\033[Kwarm-up: 0/3 requests, 0 s" in drawn
    assert "\r\033[Krepeat 2/2: 0/12 requests, 0 s" in drawn
    assert drawn.endswith("\r\033[K")


def test_reports_are_made_from_the_result(fake: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--report and --plots hand the whole result over, with the place that was asked for."""
    made: list[tuple[str, Any, Path]] = []
    for module, function in (("report", "write_report"), ("figures", "write_figures")):
        writer = SimpleNamespace(**{function: lambda result, path, module=module: made.append((module, result, path))})
        monkeypatch.setitem(sys.modules, f"ferrum_rt.load.{module}", writer)

    assert cli(*SERVE, "--report", str(tmp_path / "a.html"), "--plots", str(tmp_path / "plots" / "new")).status == 0

    assert [(module, path) for module, _, path in made] == [
        ("report", tmp_path / "a.html"),
        ("figures", tmp_path / "plots" / "new"),
    ]
    assert all(len(result.repeats[0].requests) == 12 for _, result, _ in made)
    assert (tmp_path / "plots" / "new").is_dir()


@pytest.mark.slow
def test_the_demo_model_under_load(tmp_path: Path) -> None:
    """In a process of its own, with the real model and the SDK set up as users have it: every request has its tokens and a
    whole tree of spans, and each prompt's chunks add up to it."""
    saved = tmp_path / "result.json"
    command = [*FERRUM_RT, *SERVE, "--json", "--save", str(saved)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    result_of(Result(done.returncode, done.stdout, done.stderr))
    result = msgspec.json.decode(saved.read_bytes(), type=LoadResult)
    assert_whole(result)
    assert result.target == "demo (qwen3, bfloat16, cpu), in this process"
    [repeat] = result.repeats
    prompts = {record.trace_id: record.prompt_tokens for record in repeat.requests}
    for tree in request_trees(repeat.spans):
        chunks = [attributes for phase in tree.phases for _, _, attributes in phase.events]
        computed = sum(int(str(chunk["ferrum.chunk.tokens"])) for chunk in chunks)
        assert 0 < computed <= prompts[tree.root.trace_id]


# -- serve, on others -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_daemon_with_a_file_of_spans(
    cli: Cli, tmp_path: Path, recorder: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spans that a daemon has written, in a process of its own, come to the requests that they tell of, and those of its
    other users do not."""
    monkeypatch.setattr(bench_serve, "record_spans", lambda: recorder)
    spans, path, saved = tmp_path / "spans.jsonl", tmp_path / "s", tmp_path / "result.json"
    with tracing_daemon(spans, path, step_s=0.001):
        assert cli("run", "def", "--max-tokens", "3", "--connect", str(path)).status == 0
        arguments = ("--connect", str(path), "--spans", str(spans), "--json", "--save", str(saved))
        printed = result_of(cli(*SERVE, *arguments, "--repeats", "2"))

    result = msgspec.json.decode(saved.read_bytes(), type=LoadResult)
    assert_whole(result)
    assert printed.target == f"fake (llama, float32, cpu), the daemon at {path}"
    for repeat in result.repeats:
        assert len(request_trees(repeat.spans)) == 12
        assert repeat.samples


@pytest.mark.slow
def test_spans_that_do_not_come_are_counted(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while nobody waits for them any more, and the report says for how many requests there are none."""
    monkeypatch.setattr(bench_spans, "LIMIT_S", 0.1)
    monkeypatch.setattr(bench_serve, "record_spans", SpanRecorder)
    spans, path = tmp_path / "spans.jsonl", tmp_path / "s"
    spans.touch()
    with running_daemon(path):
        printed = result_of(cli(*SERVE, "--connect", str(path), "--spans", str(spans), "--json"))

    assert (printed.summary.completed, printed.summary.spans_dropped) == (12, 12)


@pytest.mark.slow
def test_ctrl_c_ends_a_load_cleanly(cli: Cli, tmp_path: Path) -> None:
    """Quietly, with status 130, and the daemon is free of its requests."""
    path = tmp_path / "s"
    with running_daemon(path):
        command = (
            "bench",
            "serve",
            "--connect",
            str(path),
            "--requests",
            "2000",
            "--output-tokens",
            "500",
            "--warmup",
            "0",
        )
        with start(*command) as process:
            deadline = time.monotonic() + LIMIT_S
            while report(cli, str(path)).status.requests.running < 8:
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT_S)
        while report(cli, str(path)).status.pages.active:
            assert time.monotonic() < deadline

    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.slow
def test_a_daemon_that_dies_under_the_load(cli: Cli, tmp_path: Path) -> None:
    """Those who were under way, and all who come later, count as connection_lost, and there is a report."""
    path = tmp_path / "s"
    with running_daemon(path) as serving:
        command = (
            "bench",
            "serve",
            "--connect",
            str(path),
            "--requests",
            "20",
            "--output-tokens",
            "900",
            "--warmup",
            "0",
            "--json",
        )
        with start(*command) as process:
            deadline = time.monotonic() + LIMIT_S
            while report(cli, str(path)).status.requests.running < 8:
                assert time.monotonic() < deadline
            serving.kill()
            out, err = process.communicate(timeout=LIMIT_S)

    assert (process.returncode, err) == (1, b"")
    assert json.loads(out)["summary"]["errors"] == {"connection_lost": 20}


@pytest.fixture(scope="module")
def servers() -> Iterator[str]:
    with openai_servers() as url:
        yield url


@pytest.mark.slow
def test_a_server_that_speaks_openais_protocol(cli: Cli, servers: str) -> None:
    """The same load, at vLLM's address as it were: its model, its tokens, and what is not its, like spans, left out."""
    printed = result_of(cli(*SERVE, "--target", "openai", f"{servers}/vllm", "--vocab-size", "9000", "--json"))

    assert (printed.target, printed.summary.completed) == (f"demo at {servers}/vllm", 12)
    assert printed.summary.output_token_rate.mean == pytest.approx(6 * printed.summary.request_rate.mean)
    assert printed.summary.spans_dropped == 0


@pytest.mark.slow
def test_a_server_that_refuses_is_one_line(cli: Cli, servers: str) -> None:
    """What it has answered is told before anything is measured."""
    for server, message in (("strict", "ignore_eos"), ("two-models", "choose one by its name: large, small")):
        result = cli(*SERVE, "--target", "openai", f"{servers}/{server}")
        assert_one_error(result)
        assert message in result.err


# -- sweep ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_finds_a_rate(fake: None, cli: Cli, tmp_path: Path) -> None:
    """The highest of those that met the limits, with a point for each that was tried; the file says what is printed."""
    saved = tmp_path / "sweep.json"

    done = cli(*SWEEP, "--json", "--save", str(saved))

    assert (done.status, done.err) == (0, "")
    result = msgspec.json.decode(done.out, type=SweepResult)
    assert saved.read_bytes() == done.out.strip().encode()
    assert result.highest_rate == max(point.rate for point in result.points if point.is_met)
    assert all(point.is_met == (point.good_share >= 0.9) for point in result.points)
    assert result.points[0].rate == 40.0
    assert result.points[0].summary.requests == 8
    assert (result.load["from"], result.load["duration"], result.required_share) == (40.0, 0.2, 0.9)


@pytest.mark.slow
def test_a_sweep_that_finds_none(fake: None, cli: Cli) -> None:
    """Limits that nobody can keep: the table says so, with a row for each rate, and the status is 1."""
    done = cli(*SWEEP, "--from", "1000", "--ttft-slo", "0.0000001", "--warmup", "0")

    assert (done.status, done.err) == (1, "")
    assert re.search(r"^highest rate +none of those that were tried$", done.out, re.MULTILINE)
    rows = done.out.split("\n\n")[1].splitlines()[1:]
    assert len(rows) == 6  # below 25 a second hardly any request would come in 0.2 s
    assert all("not met" in row for row in rows)
    rates = [float(row.split()[0]) for row in rows]
    assert rates == sorted(rates)


# -- what makes no sense --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve --requests 0", "argument --requests: must be at least 1, got 0"),
        ("serve --concurrency 0", "argument --concurrency: must be at least 1"),
        ("serve --repeats 0", "argument --repeats: must be at least 1"),
        ("serve --warmup -1", "argument --warmup: must be at least 0"),
        ("serve --rate 0", "argument --rate: must be more than 0"),
        ("serve --rate nan", "argument --rate: must be more than 0"),
        ("serve --rate 1 --burstiness -1", "argument --burstiness: must be at least 0"),
        ("serve --burstiness 2", "argument --burstiness: goes with --rate"),
        ("serve --duration 2", "argument --duration: goes with --rate"),
        ("serve --rate 2 --duration 2 --requests 3", "argument --requests: not with --duration"),
        ("serve --rate 2 --concurrency 3", "argument --concurrency: not with --rate"),
        ("serve --prompt-tokens many", "'many' is no distribution"),
        ("serve --shared-prefix 10", "write 10x256"),
        ("serve --ttft-slo 0", "argument --ttft-slo: must be more than 0"),
        ("serve --trace nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("serve --trace x --rate 2", "argument --rate: not with --trace"),
        ("serve --target ollama http://x", "'ollama' is no kind of target"),
        ("serve --target openai http://x --connect s", "argument --target: not with --connect"),
        ("serve --target openai http://x --device cpu", "argument --device: not with --target"),
        ("serve --target openai localhost", "'localhost' is no URL"),
        ("serve --target openai http://x --vocab-size 1", "argument --vocab-size: must be at least 2"),
        ("serve --openai-model x", "argument --openai-model: goes with --target"),
        ("serve --vocab-size 9", "argument --vocab-size: goes with --target"),
        ("serve --spans x", "argument --spans: goes with --connect"),
        ("serve --spans nowhere --connect s", "nowhere: cannot be read"),
        ("serve --device cpu --connect /nowhere/s", "argument --device: not with --connect"),
        ("serve --connect /nowhere/s", "no daemon listens at /nowhere/s"),
        ("serve --save /nowhere/x.json", "argument --save: /nowhere/x.json: cannot be written"),
        ("serve --report /", "argument --report: /: cannot be written"),
        ("serve --plots /dev/null/x", "argument --plots: /dev/null/x: cannot be written"),
        ("sweep", "--ttft-slo and --itl-slo: give one of them"),
        ("sweep --itl-slo 1 --from 0", "argument --from: must be more than 0"),
        ("sweep --itl-slo 1 --share 1.5", "argument --share: must be at most 1"),
        ("sweep --itl-slo 1 --duration 0", "argument --duration: must be more than 0"),
        ("sweep --itl-slo 1 --rate 3", "unrecognized arguments: --rate 3"),
        ("", "required: KIND"),
        ("speed", "invalid choice: 'speed'"),
    ],
)
def test_what_makes_no_sense(cli: Cli, arguments: str, message: str) -> None:
    """One line names the option at fault, and nothing is opened."""
    result = cli("bench", *arguments.split())

    assert_one_error(result)
    assert message in result.err


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [
        (["--report", "a.html"], "matplotlib", "plot"),
        (["--plots", "a"], "matplotlib", "plot"),
        (["--target", "openai", "http://localhost"], "httpx", "bench"),
    ],
)
def test_a_package_that_is_missing_is_said_first(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, option: list[str], package: str, extra: str
) -> None:
    """Before the run, not after it: which extra to install."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))

    result = cli("bench", "serve", *option)

    assert_one_error(result)
    assert f"pip install 'ferrum-rt[{extra}]'" in result.err


@pytest.mark.slow
def test_a_daemon_is_measured_without_torch(tmp_path: Path) -> None:
    """What puts the load on is light: the processor is the daemon's."""
    script = (
        "import sys\n"
        "from ferrum_rt.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "sys.exit(' '.join({'torch', 'tokenizers', 'matplotlib'} & set(sys.modules)))\n"
    )
    with running_daemon(tmp_path / "s"):
        command = [sys.executable, "-c", script, *SERVE, "--connect", str(tmp_path / "s"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)

    assert done.stderr == "\n"
    assert json.loads(done.stdout)["summary"]["completed"] == 12
