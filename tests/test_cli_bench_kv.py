"""ferrum-rt bench kv as its users meet it."""

import json
from pathlib import Path

import pytest
import torch

from ferrum_rt.cli.bench.kv import _kv_report
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from tests.command_line import Cli, assert_one_error

# What docs/performance.md promises of the demo model: at most these errors, and the same token at so many positions.
BOUNDS = {"float16": (0.002, 0.02, 0.99), "fp8": (0.04, 0.5, 0.92), "int8": (0.015, 0.15, 0.96)}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.mark.slow
def test_errors_of_the_demo_model_are_bounded(cli: Cli) -> None:
    """fp8 and int8 take about half of bfloat16's memory, and logits stay within the bounds that the docs state."""
    result = cli("bench", "kv", "--tokens", "256", "--json")

    assert (result.status, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["model"]["id"], report["num_tokens"], report["num_scored"]) == ("demo", 256, 128)
    exact, *others = report["kv_dtypes"]
    # Six layers, keys and values, two heads of 64; int8 has a scale for each head.
    assert (exact["dtype"], exact["bytes_per_token"], exact["rms_error"]) == ("bfloat16", 6 * 2 * 2 * 64 * 2, 0.0)
    assert [kv["share_of_bfloat16"] for kv in others] == [1.0, 0.5, 68 / 128]
    assert [kv["dtype"] for kv in others] == list(BOUNDS)
    for kv in others:
        rms, largest, same = BOUNDS[kv["dtype"]]
        assert kv["rms_error"] <= rms
        assert kv["max_error"] <= largest
        assert kv["same_best"] >= same
        assert (kv["rms_error"] > 0.001) == (kv["dtype"] != "float16"), "an error that is too small was not measured"


@pytest.mark.slow
def test_the_table_says_what_json_says(cli: Cli, tmp_path: Path) -> None:
    """A row for each type; with --kv-dtype one beside bfloat16; on the text that is given."""
    text = tmp_path / "text.py"
    text.write_text("def add(left, right):\n    return left + right\n")
    arguments = ("bench", "kv", "--text", str(text), "--tokens", "12", "--kv-dtype", "int8")

    as_text, report = cli(*arguments).out, json.loads(cli(*arguments, "--json").out)

    assert as_text.startswith("demo (qwen3, bfloat16, cpu): logits of the last 6 of 12 tokens")
    rows = [line.split() for line in as_text.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["bfloat16", "int8"]
    for row, kv in zip(rows, report["kv_dtypes"], strict=True):
        assert row == [
            kv["dtype"],
            str(kv["bytes_per_token"]),
            f"{kv['share_of_bfloat16']:.1%}",
            f"{kv['rms_error']:.3%}",
            f"{kv['max_error']:.2%}",
            f"{kv['same_best']:.1%}",
        ]


def test_errors_are_shares_of_the_spread() -> None:
    """Logits of a standard deviation of 2, of which one in four is off by 1 at one of two positions."""
    exact = [torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([-2.0, 2.0, -2.0, 2.0])]
    found = [exact[0] + torch.tensor([0.0, 0.0, 1.0, 0.0]), exact[1]]
    num_bytes = {KvDtypeKind.BFLOAT16: 400, KvDtypeKind.INT8: 212}

    report = _kv_report(KvDtypeKind.INT8, num_bytes, found, exact)

    assert (report.bytes_per_token, report.share_of_bfloat16) == (212, 0.53)
    assert report.rms_error == pytest.approx((1 / 8) ** 0.5 / 2)
    assert (report.max_error, report.same_best) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "argument --tokens: must be at least 2, got 1"),
        (["--text", "/nowhere"], "argument --text: /nowhere: cannot be read: No such file"),
        (["--tokens", "1000000"], "tokens, and --tokens asks for 1000000"),
    ],
)
def test_what_cannot_be_measured_gets_one_line(cli: Cli, arguments: list[str], message: str) -> None:
    """A text that is not there or too short, and too few tokens, are said before a model is loaded."""
    result = cli("bench", "kv", *arguments)

    assert_one_error(result)
    assert message in result.err


@pytest.mark.slow
def test_texts_that_are_too_long_for_the_model(cli: Cli) -> None:
    """More tokens than a sequence may have are refused."""
    result = cli("bench", "kv", "--tokens", "1100")

    assert_one_error(result)
    assert "argument --tokens: this model takes at most 1024, got 1100" in result.err
