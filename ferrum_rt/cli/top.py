"""ferrum-rt top: how a daemon is doing now, again and again."""

import argparse
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

import ferrum_rt
from ferrum_rt.cli.output import discard_stdout
from ferrum_rt.cli.status import LIMIT_S
from ferrum_rt.cli.top_picture import Look, picture
from ferrum_rt.interfaces.errors import PermissionDenied, first_of
from ferrum_rt.interfaces.types import SchedulerDiagnostics
from ferrum_rt.ipc.address import socket_path
from ferrum_rt.ipc.connection import answer_within

if TYPE_CHECKING:
    from ferrum_rt.ipc.client import Client

_LEAST_INTERVAL_S, _MOST_INTERVAL_S = 0.1, 3600.0
_USUAL = os.terminal_size((80, 24))
# To the alternate screen, without a cursor, and back.
_ENTER, _LEAVE = b"\033[?1049h\033[?25l", b"\033[?25h\033[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_REST = "\033[H", "\033[K", "\033[J"
_ENDED_BY = 128  # plus the signal's number: as a shell reports it
_HUNG_UP = _ENDED_BY + signal.SIGHUP


def add_top_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", metavar="PATH", help="the daemon's socket; your own daemon's if left out")
    parser.add_argument("--interval", metavar="S", type=_interval, default=1.0, help="seconds between looks (default: 1)")
    parser.add_argument("--once", action="store_true", help="print one picture, of one interval, and end")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _LEAST_INTERVAL_S <= seconds <= _MOST_INTERVAL_S:
        wanted = f"seconds from {_LEAST_INTERVAL_S:g} to {_MOST_INTERVAL_S:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {wanted}")
    return seconds


def top(arguments: argparse.Namespace) -> int:
    """Show the daemon until q is typed; once, where standard output is no terminal."""
    is_live = sys.stdout.isatty() and not arguments.once
    # Not uvloop, which would leave the terminal in non-blocking mode, for the shell too.
    status = anyio.run(_live if is_live else _once, socket_path(arguments.socket), arguments.interval)
    if status == _HUNG_UP:
        discard_stdout()  # of a terminal that is gone nothing can even be flushed
    return status


async def _once(path: Path, interval_s: float) -> int:
    async with ferrum_rt.connect(path) as engine:
        before = await _look(engine, path)
        await anyio.sleep(interval_s)
        now = await _look(engine, path)
    width = _size().columns if sys.stdout.isatty() else _USUAL.columns
    print(_encoded("\n".join(picture(before, now, width=width))).decode(sys.stdout.encoding))
    return 0


async def _live(path: Path, interval_s: float) -> int:
    async with ferrum_rt.connect(path) as engine:
        first = await _look(engine, path)  # what goes wrong until here is no matter of the screen
        with _Screen() as screen:
            return await _Live(engine, path, interval_s, first, screen).run()


async def _look(engine: "Client", path: Path) -> Look:
    with answer_within(LIMIT_S, path):
        engine.metrics()  # asks for newer ones, which come before the answer to what is asked next
        status = await engine.status()
        return Look(status=status, metrics=engine.metrics(), diagnostics=await _diagnostics(engine))


async def _diagnostics(engine: "Client") -> SchedulerDiagnostics | None:
    try:
        return await engine.fetch_diagnostics()
    except PermissionDenied:
        return None


class _Live:
    """Looks, and draws what it sees, until a key, a signal or the daemon's end."""

    def __init__(self, engine: "Client", path: Path, interval_s: float, first: Look, screen: "_Screen") -> None:
        self._engine, self._path, self._interval_s, self._screen = engine, path, interval_s, screen
        self._before: Look | None = None
        self._now = first
        self._status = 0

    async def run(self) -> int:
        """The exit status."""
        # From before the first picture on: a resize that came between would be seen only with the next.
        receiver = anyio.open_signal_receiver(signal.SIGWINCH, signal.SIGTSTP, signal.SIGTERM, signal.SIGHUP)
        try:
            with receiver as signals:
                async with anyio.create_task_group() as self._tasks:
                    self._tasks.start_soon(self._watch_signals, signals)
                    if sys.stdin.isatty():
                        self._tasks.start_soon(self._watch_keys)
                    while True:
                        self._draw()
                        await anyio.sleep(self._interval_s)
                        self._before, self._now = self._now, await _look(self._engine, self._path)
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None
        return self._status

    def _end(self, status: int) -> None:
        self._status = status
        self._tasks.cancel_scope.cancel()

    async def _watch_signals(self, signals: AsyncIterator[signal.Signals]) -> None:
        async for number in signals:
            if number == signal.SIGWINCH:
                self._draw()
            elif number == signal.SIGTSTP:
                self._screen.leave()
                os.kill(os.getpid(), signal.SIGSTOP)  # until the shell lets it go on
                self._screen.enter()
                self._draw()
            else:
                self._end(_ENDED_BY + number)

    async def _watch_keys(self) -> None:
        while True:
            await anyio.wait_readable(sys.stdin)
            try:
                keys = os.read(sys.stdin.fileno(), 1024)
            except OSError:  # as with no keys at all: the terminal is gone
                keys = b""
            if not keys:
                self._end(_HUNG_UP)
            if b"q" in keys.lower():
                self._end(0)

    def _draw(self) -> None:
        size = _size()
        lines = picture(self._before, self._now, width=size.columns, height=size.lines)
        frame = _HOME + "\n".join(_CLEAR_LINE + line for line in lines)
        if len(lines) < size.lines:
            frame += f"\n{_CLEAR_REST}"
        try:
            _write(_encoded(frame))
        except OSError:  # the terminal is gone
            self._end(_HUNG_UP)


class _Screen:
    """One of our own, and keys without an Enter; at the end the terminal is what it was, if it is still there."""

    def __init__(self) -> None:
        self._keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._modes = None if self._keyboard is None else termios.tcgetattr(self._keyboard)

    def __enter__(self) -> "_Screen":
        try:
            self.enter()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.leave()

    def enter(self) -> None:
        if self._keyboard is not None:
            tty.setcbreak(self._keyboard, termios.TCSANOW)
        _write(_ENTER)

    def leave(self) -> None:
        with suppress(OSError):
            _write(_LEAVE)
        if self._keyboard is not None and self._modes is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._keyboard, termios.TCSANOW, self._modes)


def _size() -> os.terminal_size:
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return _USUAL
    return os.terminal_size((found.columns or _USUAL.columns, found.lines or _USUAL.lines))


def _encoded(text: str) -> bytes:
    """Clients' names may have characters that the terminal has not."""
    return text.encode(sys.stdout.encoding, "replace")


def _write(data: bytes) -> None:
    """Past Python's own stream, which would keep what it cannot write."""
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
