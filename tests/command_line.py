"""ferrum-rt as tests call it: in this process, or as one of its own."""

import io
import os
import re
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest

from ferrum_rt.cli import main

# What the installed ferrum-rt script does.
FERRUM_RT = [sys.executable, "-c", "import sys; from ferrum_rt.cli import main; sys.exit(main())"]
LIMIT_S = 120


class Result(NamedTuple):
    status: int
    out: str
    err: str


class Cli:
    """Runs a command in this process, and reads what it printed from ``capsys``."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        status = main(list(arguments))
        return Result(status, *self._capsys.readouterr())


def start(*arguments: str, terminal: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    """A process of its own, on pipes, or with standard input and output on a terminal."""
    # A shell that runs the tests in the background has them ignore SIGINT, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([*FERRUM_RT, *arguments], stdin=terminal, stdout=terminal, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)


def read_byte(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 1)  # what a reader of its own had taken beyond would be lost to communicate()


def read_until(terminal: io.RawIOBase, end: bytes) -> None:
    seen = b""
    while not seen.endswith(end):
        seen += terminal.read(1) or b""


def assert_one_error(result: Result) -> None:
    assert result.status == 2
    assert result.out == ""
    assert re.fullmatch(r"ferrum-rt: error: \S.*\n", result.err), result.err
