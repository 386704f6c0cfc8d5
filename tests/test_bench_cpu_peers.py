"""What bench/cpu_peers.py makes of measurements, and what it says of peers that are not there."""

import sys
from pathlib import Path

import pytest

from bench._cpu_engines import Measured, Shape
from bench._cpu_limits import Machine, least_seconds
from bench.cpu_peers import CONTENDERS, OURS, REFERENCE, Contender, agreements, look_for, show, summarize

CONFIG = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "vocab_size": 100,
}
LAYER_WEIGHTS = 2 * 16 * (2 * (4 + 2) * 8 + 3 * 32)
HEAD_WEIGHTS = 16 * 100
ENDLESS = {"bf16": 1e30, "int8": 1e30}
DECODE, PREFILL = Shape(2, 3, 4), Shape(1, 10, 1)
OUR_BF16, PEER_BF16 = Contender(OURS, "", "bf16"), Contender("OpenVINO", "paged", "bf16")
SLOW_PEER = Contender("OpenVINO", "stateful", "bf16")


def test_limit_by_memory() -> None:
    """Each step reads every weight once, in the width's bytes, and the keys and values of what came before it."""
    shape = Shape(2, 3, 3)
    key_bytes = (
        2 * 2 * 2 * 2 * 8 * 2 * (4 + 5)
    )  # 2 requests; keys and values; 2 layers, 2 heads, 8, 2 bytes; contexts of 4 and 5
    weights = 3 * (LAYER_WEIGHTS + HEAD_WEIGHTS)
    machine = Machine(1000.0, ENDLESS)
    assert least_seconds(CONFIG, "bf16", shape, machine) == pytest.approx((2 * weights + key_bytes) / 1000)
    assert least_seconds(CONFIG, "int8", shape, machine) == pytest.approx((weights + key_bytes) / 1000)


def test_limit_by_arithmetic() -> None:
    """A prompt costs two operations per weight and token, the head only for the last token, and attention at bf16's rate."""
    machine = Machine(1e30, {"bf16": 1000.0, "int8": 2000.0})
    products, attention = 2 * (10 * LAYER_WEIGHTS + HEAD_WEIGHTS), 4 * 2 * 4 * 8 * 55
    assert least_seconds(CONFIG, "bf16", PREFILL, machine) == pytest.approx((products + attention) / 1000)
    assert least_seconds(CONFIG, "int8", PREFILL, machine) == pytest.approx(products / 2000 + attention / 1000)


def test_rows_take_the_best_way_of_the_best_peer() -> None:
    """Ours is compared with the fastest way, within each repeat; prefill counts the prompt's tokens."""
    others = {SLOW_PEER: 4.0, REFERENCE: 3.0}
    seconds = [{OUR_BF16: 1.0, PEER_BF16: 2.0, **others}, {OUR_BF16: 2.0, PEER_BF16: 1.0, **others}]
    repeats = [
        {who: {shape: Measured(taken, []) for shape in (DECODE, PREFILL)} for who, taken in each.items()} for each in seconds
    ]
    machine = Machine(1e9, {"bf16": 1e12, "int8": 1e12})
    rows = summarize(CONFIG, [DECODE, PREFILL], [OUR_BF16, PEER_BF16, SLOW_PEER, REFERENCE], repeats, machine)
    assert [(row["measure"], row["width"]) for row in rows] == [("decode", "bf16"), ("prefill", "bf16")]
    assert tuple(rows[0]["tokens_per_s"][OURS]) == (6.0, 4.0, 8.0)
    assert tuple(rows[1]["tokens_per_s"][OURS]) == (7.5, 5.0, 10.0)
    assert rows[0]["best_peer"] == "OpenVINO paged"
    assert rows[0]["best_way"] == {"OpenVINO": "paged", "transformers": "generate"}
    assert tuple(rows[0]["ours_over_best_peer"]) == (1.25, 0.5, 2.0)
    limit = 8 / least_seconds(CONFIG, "bf16", DECODE, machine)
    assert rows[0]["share_of_limit"][OURS].median == pytest.approx(6.0 / limit)
    assert "6.0 (4.0 to 8.0) paged" in show(rows)


def test_rows_without_ours() -> None:
    """Where ours cannot do a width, its row has no ratio, and the table says so with a dash."""
    repeats = [{PEER_BF16: {DECODE: Measured(1.0, [])}}]
    rows = summarize(CONFIG, [DECODE], [PEER_BF16], repeats, Machine(1e9, ENDLESS))
    assert "ours_over_best_peer" not in rows[0]
    assert show(rows).splitlines()[-1].split()[:5] == ["decode,", "2", "at", "once", "bf16"]
    assert show(rows).rstrip().endswith("-")


def test_wrong_conversion_is_suspected() -> None:
    """An engine whose first tokens are not those of transformers is found out, but not one that parts later, nor int8."""
    wrong, parts_late, int8 = PEER_BF16, OUR_BF16, Contender("llama.cpp", "", "int8")
    outputs = {REFERENCE: [[1, 2], [3, 4]], wrong: [[9, 2], [9, 4]], parts_late: [[1, 9], [3, 4]], int8: [[9, 9], [9, 9]]}
    repeats = [{who: {DECODE: Measured(1.0, tokens)} for who, tokens in outputs.items()}]
    rows = {row["contender"]: row for row in agreements(repeats, list(outputs))}
    assert {name for name, row in rows.items() if row["is_suspect"]} == {str(wrong)}
    assert rows[str(parts_late)]["first"] == 1.0
    assert rows[str(parts_late)]["all"] == 0.75


@pytest.mark.parametrize("python", [None, Path("/nowhere/python")])
def test_no_interpreter(python: Path | None) -> None:
    """Without the peers' interpreter, or with a wrong one, one is told how to get it."""
    found = look_for("llama.cpp", python)
    assert found.lack is not None
    assert "make bench-peers" in found.lack


def test_names_of_packages_that_lack() -> None:
    """What is not installed is named, and nothing else."""
    found = look_for("OpenVINO", Path(sys.executable))
    assert found.lack is not None
    assert "lacks openvino-genai, optimum-intel, nncf:" in found.lack
    assert found.versions == {}


def test_every_contender_has_a_name_of_its_own() -> None:
    """Figures are told apart by name and width."""
    assert len({str(contender) for contender in CONTENDERS}) == len(CONTENDERS)
