"""A terminal with a command in it: what stands on its screen, and what is typed."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.command_line import LIMIT_S

# The process has the terminal for its own, as from a login, so that Ctrl-C and its closing reach it.
_IN_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(1, termios.TIOCSCTTY, 0)
from ferrum_rt.cli import main
sys.exit(main())
"""
_CONTROL = re.compile(r"\x1b\[(\??\d*)([A-Za-z])")


class Screen:
    """What a terminal shows that understands as much as ferrum-rt says, and nothing else."""

    def __init__(self, num_lines: int, num_columns: int) -> None:
        self.lines: list[str] = [""]
        self.num_drawn = 0  # pictures, which begin at the top
        self._num_lines, self._num_columns = num_lines, num_columns
        self.is_alternate, self.has_cursor = False, True
        self._row = self._column = 0
        self._pending = ""

    def resize(self, num_lines: int, num_columns: int) -> None:
        self._num_lines, self._num_columns = num_lines, num_columns
        self.lines = [line[:num_columns] for line in self.lines[:num_lines]]

    def feed(self, text: str) -> None:
        text, self._pending = self._pending + text, ""
        position = 0
        while position < len(text):
            character = text[position]
            if character == "\x1b":
                control = _CONTROL.match(text, position)
                if control is None:  # its end is still to come
                    self._pending = text[position:]
                    return
                self._obey(control[1], control[2])
                position = control.end()
                continue
            position += 1
            if character == "\n":
                self._row += 1
                assert self._row < self._num_lines, "it would scroll"
                self.lines += [""] * (self._row + 1 - len(self.lines))
            elif character == "\r":
                self._column = 0
            else:
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
                self._column += 1
                assert self._column <= self._num_columns, "it would wrap"

    def _obey(self, number: str, letter: str) -> None:
        match number + letter:
            case "?1049h" | "?1049l":
                self.is_alternate = letter == "h"
                self.lines, self._row, self._column = [""], 0, 0
            case "?25h" | "?25l":
                self.has_cursor = letter == "h"
            case "H":
                self.num_drawn += 1
                self._row = self._column = 0
            case "K":
                self.lines[self._row] = self.lines[self._row][: self._column]
            case "J":
                self.lines[self._row] = self.lines[self._row][: self._column]
                del self.lines[self._row + 1 :]
            case unknown:
                raise AssertionError(f"a terminal may not know {unknown!r}")


class Terminal:
    """``modes`` are the terminal's own, as termios has them."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int, screen: Screen) -> None:
        self.process, self.screen = process, screen
        self._ours = ours

    @property
    def modes(self) -> list[object]:
        return termios.tcgetattr(self._ours)

    def resize(self, lines: int, columns: int) -> None:
        """Wait until something is drawn on it."""
        num_drawn = self.screen.num_drawn
        self.screen.resize(lines, columns)
        termios.tcsetwinsize(self._ours, (lines, columns))
        self.until(lambda _: self.screen.num_drawn > num_drawn)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """Read on until what stands there meets it; returns that."""
        deadline = time.monotonic() + LIMIT_S
        while not condition(self.screen.lines):
            assert time.monotonic() < deadline, self.screen.lines
            self._read(0.1)
        return list(self.screen.lines)

    def end(self) -> tuple[int, str]:
        """Wait for the process's end; its exit status, and what it wrote to standard error."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.screen.lines
            self._read(0.05)
        self._read(0.0)
        assert self.process.stderr is not None
        return self.process.returncode, self.process.stderr.read().decode()

    def close(self) -> None:
        """As somebody closes its window."""
        os.close(self._ours)
        self._ours = -1

    def _read(self, wait_s: float) -> None:
        if self._ours >= 0 and select.select([self._ours], [], [], wait_s)[0]:
            self.screen.feed(os.read(self._ours, 65536).decode())


@contextmanager
def terminal(*arguments: str, lines: int = 30, columns: int = 100, has_keys: bool = True) -> Iterator[Terminal]:
    """``ferrum-rt`` with these arguments, in one of this size; standard error is a pipe. Without keys standard
    input is none."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (lines, columns))
    stdin = theirs if has_keys else subprocess.DEVNULL
    command = [sys.executable, "-c", _IN_TERMINAL, *arguments]
    with subprocess.Popen(command, stdin=stdin, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True) as process:
        shown = Terminal(process, ours, Screen(lines, columns))
        try:
            yield shown
        finally:
            process.kill()
            for descriptor in {theirs, shown._ours} - {-1}:
                os.close(descriptor)
