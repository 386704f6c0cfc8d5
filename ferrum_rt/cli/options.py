"""Options that several commands share, and what they mean to the engine. Checked before torch is loaded."""

import argparse
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec

import ferrum_rt
from ferrum_rt.interfaces.config import EngineConfig, build_config, load_config
from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from ferrum_rt.interfaces.requests import check_sampling
from ferrum_rt.interfaces.types import DataType, Device, SamplingParams

# Options that go by the same name in open_runtime and in SamplingParams.
_ENGINE = ("device", "dtype", "kv_dtype", "load_format")
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
# Options that say which engine is opened.
ENGINE_OPTIONS = ("model", "config", *_ENGINE)


class UsageError(Exception):
    """The command line makes no sense."""


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="a directory or a hub id; the demo model if left out")


def add_json_option(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--config", metavar="FILE.toml", type=Path, help="a configuration, which the options overrule")
    parser.add_argument("--device", choices=[item.value for item in Device], help="where to compute")
    parser.add_argument("--dtype", choices=[item.value for item in DataType], help="type of weights and activations")
    parser.add_argument("--kv-dtype", choices=[item.value for item in KvDtypeKind], help="type of cached keys and values")
    parser.add_argument("--load-format", choices=["auto", "dummy"], help="dummy: random weights of the model's shape")


def add_connect_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--connect",
        metavar="SOCKET",
        nargs="?",
        default=argparse.SUPPRESS,  # no attribute: not given; None: given without a path
        help=help,
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", metavar="N", type=int, help="generate at most N tokens")
    parser.add_argument("--temperature", metavar="T", type=float, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", metavar="P", type=float, help="choose among the likeliest tokens that sum to P")
    parser.add_argument("--top-k", metavar="K", type=int, help="choose among the K likeliest tokens; 0: among all")
    parser.add_argument("--seed", metavar="S", type=int, help="the same seed gives the same text")
    parser.add_argument("--stop", metavar="STRING", nargs="+", action="extend", help="end before any of these strings")


def open_engine(arguments: argparse.Namespace) -> AbstractAsyncContextManager[InferenceEngine]:
    """The engine that the options ask for, to be opened: one in this process, or with --connect the daemon's, which needs no
    torch here. Raises ConfigError, and UsageError for an option that would mean nothing to a daemon."""
    if "connect" not in arguments:
        return ferrum_rt.open_runtime(config=engine_config(arguments))
    for name in given_options(arguments, ENGINE_OPTIONS):
        raise UsageError(f"argument {option_name(name)}: not with --connect: the daemon has opened its model already")
    return ferrum_rt.connect(arguments.connect)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """Raises ConfigError."""
    base = None if arguments.config is None else load_config(arguments.config)
    return build_config(arguments.model, base, engine_fields(arguments))


def engine_fields(arguments: argparse.Namespace) -> dict[str, object]:
    """The keywords of open_runtime that were given as options, and a bar for the person at the terminal."""
    return given_options(arguments, _ENGINE) | {"monitoring": {"progress": True}}


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """Raises RequestValidationError."""
    params = msgspec.convert(given_options(arguments, _SAMPLING), SamplingParams)
    check_sampling(params)
    return params


def given_options(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of ``names`` that the command has and the user has given."""
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def option_name(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"
