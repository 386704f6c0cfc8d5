"""ferrum-rt simulate as its users meet it."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.command_line import Cli, assert_one_error

SMALL = (
    "--requests",
    "20",
    "--rate",
    "5",
    "--prompt-tokens",
    "uniform:5,50",
    "--output-tokens",
    "normal:8,2",
    "--slots",
    "2",
)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def test_the_report_is_the_same_for_the_same_seed(cli: Cli) -> None:
    """The seed decides everything, and another one decides otherwise."""
    first, again, other = (cli("simulate", *SMALL, "--json", "--seed", seed) for seed in ("1", "1", "2"))

    assert (first.status, first.err) == (0, "")
    assert first.out == again.out != other.out


def test_the_table_says_what_json_says(cli: Cli) -> None:
    """Clients have a row each, and all together one; the figures are those of --json."""
    arguments = ("simulate", *SMALL, "--client", "ada=2", "--client", "bob=1:high", "--ttft-slo", "0.5")

    text, report = cli(*arguments).out, json.loads(cli(*arguments, "--json").out)

    rows = [line.split() for line in text.splitlines()[-4:]]
    assert [row[0] for row in rows] == ["client", "ada", "bob", "all"]
    for row, client in zip(rows[1:], [*report["clients"], report["total"]], strict=True):
        assert row[1:4] == [str(client[name]) for name in ("requests", "finished", "output_tokens")]
        assert row[-1] == f"{client['attainment']:.1%}"
    assert report["objectives"] == {"ttft_s": 0.5, "itl_s": None}
    assert f"{report['steps']} steps" in text


def test_the_options_overrule_the_configuration(cli: Cli, tmp_path: Path) -> None:
    """The engine is the file's, but for what the command line says."""
    config = tmp_path / "engine.toml"
    config.write_text("[scheduler]\nmax_running_requests = 3\n[kv_cache]\nblock_size = 8\nnum_pages = 70\n")

    report = json.loads(cli("simulate", *SMALL, "--config", str(config), "--max-model-len", "99", "--json").out)

    assert report["engine"] == {
        "slots": 2,
        "pages": 70,
        "block_size": 8,
        "max_batched_tokens": 512,
        "max_model_len": 99,
    }


def test_a_trace_is_replayed(cli: Cli, tmp_path: Path) -> None:
    """The requests are the trace's: at a second a step the first token comes when it must."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 5, "prompt_tokens": 9, "output_tokens": 3, "client": "ada"}\n')
    costs = ("--step-ms", "1000", "--token-us", "0", "--sequence-us", "0", "--context-ns", "0")

    report = json.loads(cli("simulate", "--trace", str(trace), *costs, "--json").out)

    (client,) = report["clients"]
    assert (client["client"], client["ttft_s"]["p50"], client["itl_s"]["p50"]) == ("ada", 1.0, 1.0)
    assert (report["seconds"], report["steps"]) == (8.0, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.html", b"<!doctype html>")])
def test_a_picture(cli: Cli, tmp_path: Path, name: str, start: bytes) -> None:
    """--plot draws a picture of the kind that the name says, beside the report."""
    path = tmp_path / name

    result = cli("simulate", *SMALL, "--ttft-slo", "1", "--plot", str(path))

    assert (result.status, result.err) == (0, "")
    assert path.read_bytes().startswith(start)


def test_a_picture_without_matplotlib(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    result = cli("simulate", *SMALL, "--plot", str(tmp_path / "a.png"))

    assert_one_error(result)
    assert "pip install 'ferrum-rt[plot]'" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "many"], "'many' is no distribution"),
        (["--rate", "0"], "rate must be more than 0"),
        (["--requests", "0"], "--requests: must be more than 0"),
        (["--deadline", "-1"], "--deadline: must be more than 0"),
        (["--ttft-slo", "0"], "--ttft-slo: must be more than 0"),
        (["--itl-slo", "nan"], "--itl-slo: must be more than 0"),
        (["--client", "ada"], "write NAME=SHARE"),
        (["--slots", "0"], "scheduler.max_running_requests must be at least 1"),
        (["--pages", "1", "--max-model-len", "100"], "kv_cache.num_pages"),
        (["--step-ms", "-1"], "--step-ms"),
        (["--plot", "a.gif"], "must end in one of .png"),
        (["--shared-prefix", "-1"], "--shared-prefix: must be at least 0"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--trace", "x", "--rate", "2"], "--rate: not with --trace"),
    ],
)
def test_what_makes_no_sense(cli: Cli, arguments: list[str], message: str) -> None:
    """One line names the option or the field at fault."""
    result = cli("simulate", *arguments)

    assert_one_error(result)
    assert message in result.err
