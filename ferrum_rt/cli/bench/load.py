"""What the load benches send, by their options."""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

from ferrum_rt.cli.bench.options import DRAWN
from ferrum_rt.cli.options import UsageError, given_options, option_name
from ferrum_rt.load.results import Limits
from ferrum_rt.load.workload import Load, SharedPrefixes
from ferrum_rt.runtime.simulation.workload import Sizes, read_trace

_COUNTS = ("requests", "concurrency", "repeats")
_MORE_THAN_0 = ("duration", "rate", "begin", "share", "ttft_slo", "itl_slo")
_FROM_0 = ("burstiness", "warmup")

# An option → another that it is nothing without, or cannot be beside.
_NEEDS = {"duration": "rate", "burstiness": "rate"}
_EXCLUDES = {"requests": "duration", "concurrency": "rate"}


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises UsageError naming the option that is out of its range."""
    checks: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (_COUNTS, lambda value: value >= 1, "at least 1"),
        (_MORE_THAN_0, lambda value: 0 < value < math.inf, "more than 0"),
        (_FROM_0, lambda value: 0 <= value < math.inf, "at least 0"),
        (("share",), lambda value: value <= 1, "at most 1"),
    )
    for names, is_right, what in checks:
        for name, value in given_options(arguments, names).items():
            if not is_right(value):
                option = "--from" if name == "begin" else option_name(name)
                raise UsageError(f"argument {option}: must be {what}, got {value:g}")


def read_load(arguments: argparse.Namespace) -> Load:
    """Of ``bench serve``. Raises UsageError, and ConfigError."""
    given = given_options(arguments, DRAWN)
    if arguments.trace is not None:
        for name in given:
            raise UsageError(f"argument {option_name(name)}: not with --trace, which says what requests there are")
        return _load(DRAWN, requests=len(read_trace(arguments.trace)), trace=arguments.trace)
    for name, other in _NEEDS.items():
        if name in given and other not in given:
            raise UsageError(f"argument {option_name(name)}: goes with {option_name(other)}")
    for name, other in _EXCLUDES.items():
        if name in given and other in given:
            raise UsageError(f"argument {option_name(name)}: not with {option_name(other)}")
    drawn = DRAWN | given
    requests = drawn["requests"]
    if "duration" in given:
        requests = max(1, round(given["rate"] * given["duration"]))
    return _load(drawn, requests=requests, rate=drawn["rate"], concurrency=drawn["concurrency"])


def sweep_load(arguments: argparse.Namespace) -> Load:
    """Of ``bench sweep``, whose rates are to come. Raises ConfigError."""
    if arguments.ttft_slo is None and arguments.itl_slo is None:
        raise UsageError("--ttft-slo and --itl-slo: give one of them at least; without a limit every rate meets it")
    drawn = DRAWN | given_options(arguments, ("burstiness", "prompt_tokens", "output_tokens", "shared_prefix"))
    return _load(drawn, requests=1, rate=arguments.begin)


def read_limits(arguments: argparse.Namespace) -> Limits:
    return Limits(ttft_s=arguments.ttft_slo, itl_s=arguments.itl_slo)


def seeds_of(arguments: argparse.Namespace) -> range:
    """One for each repeat."""
    return range(arguments.seed, arguments.seed + arguments.repeats)


def described(arguments: argparse.Namespace, load: Load) -> dict[str, object]:
    """For people, and to do it again; by the options' names."""
    what: dict[str, object] = {"requests": load.requests}
    if load.trace is not None:
        what["trace"] = str(load.trace)
    else:
        what |= (
            {"concurrency": load.concurrency} if load.rate is None else {"rate": load.rate, "burstiness": load.burstiness}
        )
        what |= _sizes(arguments)
    return what | given_options(arguments, ("seed", "warmup", "repeats"))


def described_sweep(arguments: argparse.Namespace, load: Load) -> dict[str, object]:
    """Likewise."""
    search = {"from": arguments.begin, "duration": arguments.duration, "burstiness": load.burstiness}
    return search | _sizes(arguments) | given_options(arguments, ("seed", "warmup"))


def _sizes(arguments: argparse.Namespace) -> dict[str, object]:
    given = given_options(arguments, ("prompt_tokens", "output_tokens", "shared_prefix"))
    return {name: DRAWN[name] for name in ("prompt_tokens", "output_tokens")} | given


def _load(drawn: Mapping[str, Any], **fields: Any) -> Load:
    prefixes = drawn["shared_prefix"]
    return Load(
        prompt=Sizes.parse(drawn["prompt_tokens"]),
        output=Sizes.parse(drawn["output_tokens"]),
        prefixes=None if prefixes is None else SharedPrefixes.parse(prefixes),
        burstiness=drawn["burstiness"],
        **fields,
    )
