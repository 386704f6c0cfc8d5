"""tools.simulate_seeds: what it prints, and that a violation can be seen again."""

import json

import pytest

from tools.simulate_seeds import main


@pytest.mark.slow
def test_seeds_without_a_violation(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is JSON with the count, and the exit status is 0."""
    status = main(["--seeds", "60", "--start", "5", "--processes", "2"])

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0
    assert (report["seeds"], report["start"], report["violations"]) == (60, 5, 0)
    assert report["steps"] > 60


@pytest.mark.slow
def test_a_violation_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    """It names seed, step and invariant, and the command that shows it again."""
    assert main(["--seeds", "3", "--processes", "1", "--max-wait-steps", "1"]) == 1

    first, command, *_ = capsys.readouterr().out.splitlines()
    seed, step = first.split()[1].rstrip(","), first.split()[3].rstrip(":")
    assert "bounded wait" in first
    assert command.split() == ["python", "-m", "tools.simulate_seeds", "--replay", seed, "--max-wait-steps", "1"]

    assert main(command.split()[3:]) == 1

    again = capsys.readouterr().out.splitlines()
    assert again[-1] == first
    assert int(step) > 0
    assert again[0].startswith("engine  Scenario(")


def test_a_replay_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a seed that violates nothing every event is printed, and then the hash of them all."""
    assert main(["--replay", "4"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= {"engine", "submit", "step", "update"}
    assert "nothing violated" in lines[-1]
