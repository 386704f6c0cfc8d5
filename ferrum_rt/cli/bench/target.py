"""Whom the load benches measure, by their options."""

import argparse
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from ferrum_rt.cli.bench.options import OPENAI_VOCAB_SIZE
from ferrum_rt.cli.options import ENGINE_OPTIONS, UsageError, given_options, open_engine, option_name
from ferrum_rt.cli.output import described_model
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.ipc.address import socket_path
from ferrum_rt.load.targets import EngineTarget, Target

_UNLIMITED = 2**31
_OF_OPENAI = ("openai_model", "vocab_size")


class OpenTarget(NamedTuple):
    """A target, its name for people, and what its prompts may be."""

    target: Target
    name: str
    vocabulary: list[TokenId]
    max_model_len: int


def check_target(arguments: argparse.Namespace) -> None:
    """Before anything is loaded. Raises UsageError."""
    if arguments.target is None:
        for name in given_options(arguments, _OF_OPENAI):
            raise UsageError(f"argument {option_name(name)}: goes with --target openai URL")
        return
    kind, _ = arguments.target
    if kind != "openai":
        raise UsageError(f"argument --target: {kind!r} is no kind of target; write openai and the server's URL")
    if "connect" in arguments:
        raise UsageError("argument --target: not with --connect, which is another target")
    for name in given_options(arguments, ENGINE_OPTIONS):
        raise UsageError(f"argument {option_name(name)}: not with --target: the server has opened its model already")
    if arguments.vocab_size is not None and arguments.vocab_size < 2:
        raise UsageError(f"argument --vocab-size: must be at least 2, got {arguments.vocab_size}")
    if any(importlib.util.find_spec(name) is None for name in ("httpx", "httpx_sse")):
        raise UsageError("argument --target: needs httpx and httpx-sse; install them with: pip install 'ferrum-rt[bench]'")


def is_in_this_process(arguments: argparse.Namespace) -> bool:
    return arguments.target is None and "connect" not in arguments


@asynccontextmanager
async def open_target(arguments: argparse.Namespace) -> AsyncIterator[OpenTarget]:
    """Raises what opening it raises."""
    if arguments.target is not None:
        from ferrum_rt.load.openai_target import open_openai  # its packages are an extra

        _, url = arguments.target
        async with open_openai(url, arguments.openai_model) as server:
            vocabulary = _vocabulary(arguments.vocab_size or OPENAI_VOCAB_SIZE)
            yield OpenTarget(server, f"{server.model} at {url}", vocabulary, server.max_model_len or _UNLIMITED)
        return
    where = "in this process" if is_in_this_process(arguments) else f"the daemon at {socket_path(arguments.connect)}"
    async with open_engine(arguments) as engine:
        model = (await engine.status()).model
        assert model is not None  # it is open
        name = f"{described_model(model)}, {where}"
        yield OpenTarget(EngineTarget(engine), name, _vocabulary(model.vocab_size), model.max_model_len)


def _vocabulary(size: int) -> list[TokenId]:
    return [TokenId(number) for number in range(size)]
