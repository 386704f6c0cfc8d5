"""What a load test sends."""

from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.cli.bench.options import DRAWN
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.types import Priority, TokenId
from ferrum_rt.load.workload import Load, LoadRequest, SharedPrefixes
from ferrum_rt.runtime.simulation.workload import Sizes

VOCABULARY = [TokenId(number) for number in range(500)]
FIXED = Sizes.parse("4")


def draw(load: Load, seed: int = 0, max_model_len: int = 10**6) -> list[LoadRequest]:
    return load.draw(seed, vocabulary=VOCABULARY, max_model_len=max_model_len)


def test_a_seed_decides_everything() -> None:
    """The same seed gives the same requests, to the token; another gives others."""
    load = Load(requests=20, prompt=Sizes.parse("uniform:5,50"), output=Sizes.parse("normal:8,2"), rate=3.0)

    assert draw(load, 1) == draw(load, 1)
    assert [request.token_ids for request in draw(load, 1)] != [request.token_ids for request in draw(load, 2)]
    assert [request.due_s for request in draw(load, 1)] != [request.due_s for request in draw(load, 2)]


@pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens"])
def test_sizes_left_out_are_like_sharegpt(name: str) -> None:
    """Their mean and standard deviation are those that the option's default says: 202 tokens in, 179 out."""
    mean, deviation = {"prompt_tokens": (202, 202), "output_tokens": (179, 179)}[name]

    requests = draw(Load(requests=6000, prompt=FIXED, output=Sizes.parse(DRAWN[name])))

    sizes = [request.output_tokens for request in requests]
    assert fmean(sizes) == pytest.approx(mean, rel=0.06)  # four standard errors
    assert stdev(sizes) == pytest.approx(deviation, rel=0.25)  # of a long tail it is known less well


@pytest.mark.parametrize("burstiness", [0.0, 0.5, 1.0, 2.0])
def test_burstiness_is_the_distances_coefficient_of_variation(burstiness: float) -> None:
    """So many requests a second come, at distances that vary so much; 0 is a metronome."""
    requests = draw(Load(requests=4000, prompt=FIXED, output=FIXED, rate=20.0, burstiness=burstiness))

    due = [request.due_s for request in requests if request.due_s is not None]
    distances = [after - before for before, after in pairwise(due)]
    assert len(due) == 4000
    assert fmean(distances) == pytest.approx(1 / 20, rel=0.01 + 0.07 * burstiness)
    assert stdev(distances) / fmean(distances) == pytest.approx(burstiness, rel=0.15, abs=1e-6)


def test_the_closed_loop_has_no_times() -> None:
    """Without a rate nothing is due at a time."""
    assert {request.due_s for request in draw(Load(requests=5, prompt=FIXED, output=FIXED, concurrency=2))} == {None}


def test_prefixes_are_shared() -> None:
    """Prompts begin with one of ten texts, the same in every repeat, and go on each with its own."""
    load = Load(requests=200, prompt=Sizes.parse("256"), output=FIXED, prefixes=SharedPrefixes.parse("10x256"))

    first, second = draw(load, 1), draw(load, 2)

    assert {len(request.token_ids) for request in first} == {512}
    begins = {tuple(request.token_ids[:256]) for request in first}
    assert len(begins) == 10
    assert {tuple(request.token_ids[:256]) for request in second} == begins
    rests = {tuple(request.token_ids[256:]) for request in [*first, *second]}
    assert len(rests) == 400


@settings(max_examples=40, deadline=None)
@given(
    max_model_len=st.integers(2, 600),
    prompt=st.sampled_from(["1", "500", "uniform:1,600", "lognormal:202,202"]),
    output=st.sampled_from(["1", "700", "lognormal:179,179"]),
    prefixes=st.sampled_from([None, SharedPrefixes(3, 40)]),
)
def test_requests_are_cut_to_what_the_model_takes(
    max_model_len: int, prompt: str, output: str, prefixes: SharedPrefixes | None
) -> None:
    """A prompt and its output fit together, and neither is empty."""
    load = Load(requests=5, prompt=Sizes.parse(prompt), output=Sizes.parse(output), prefixes=prefixes)
    for request in draw(load, max_model_len=max_model_len):
        assert request.token_ids
        assert request.output_tokens >= 1
        assert len(request.token_ids) + request.output_tokens <= max_model_len


def test_a_trace_is_sent_as_it_was(tmp_path: Path) -> None:
    """Times, sizes, clients, priorities and deadlines are the trace's; what is in the prompts is drawn."""
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival_s": 1.5, "prompt_tokens": 9, "output_tokens": 3, "client": "ada", "priority": "high"}\n'
        '{"arrival_s": 0, "prompt_tokens": 4, "output_tokens": 2, "deadline_s": 7}\n'
    )

    first, second = draw(Load(requests=0, prompt=FIXED, output=FIXED, trace=path))

    assert (first.due_s, len(first.token_ids), first.output_tokens, first.deadline_s) == (0.0, 4, 2, 7.0)
    assert (second.due_s, len(second.token_ids), second.client, second.priority) == (1.5, 9, "ada", Priority.HIGH)


@pytest.mark.parametrize("text", ["", "10", "x", "0x4", "4x0", "-1x4", "2x3x4", "1.5x4"])
def test_what_are_no_shared_prefixes(text: str) -> None:
    """The error says how they are written."""
    with pytest.raises(ConfigError, match="write 10x256"):
        SharedPrefixes.parse(text)
