"""The daemon's log: one JSON object a line on standard error. A line that cannot be written at once is lost: nobody waits
for a reader.

Nothing that a client sent is in it, nor what a model answered: of an error that was not foreseen there is the type and the
place, not the message, for that may quote either.
"""

import datetime
import json
import logging
import os
import select
import sys
import threading
import traceback
from contextlib import suppress

_MAX_FRAMES = 16
# What every LogRecord has; anything else was given as ``extra``.
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class StandardError:
    """Lines from several threads, none of them torn by another's. It goes past Python's own stream, which would keep what
    it cannot write, to try again when the process ends. A pipe that can be written to takes ``PIPE_BUF`` bytes at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._is_within = False  # a line has begun, and waits for the reader
        self._poll = self._polling()

    def write_nowait(self, line: bytes) -> None:
        """Or never. Raises OSError."""
        with self._lock:
            if not self._is_within and self._poll.poll(0):
                os.write(self._descriptor, line)

    def write(self, lines: bytes) -> None:
        """However long the reader takes; in one thread at a time. Raises OSError."""
        waiting = self._polling()  # two threads cannot poll with the same object
        try:
            for line in lines.splitlines(keepends=True):
                while line:
                    waiting.poll()
                    with self._lock:
                        # Nobody waits for the lock longer than for this: none of it waits for the reader.
                        while line and self._poll.poll(0):
                            line = line[os.write(self._descriptor, line[: select.PIPE_BUF]) :]
                        self._is_within = bool(line)
        finally:
            self._is_within = False

    def _polling(self) -> select.poll:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return poll


def set_up(level: str) -> StandardError | None:
    """For a process that is ours: its root logger writes to standard error, warnings and asyncio's complaints included.
    Returns what it writes to; None where there is no standard error, for another file may have been given its number."""
    stream = None if sys.stderr is None else StandardError(sys.stderr.fileno())
    logging.getLogger().handlers = [logging.NullHandler() if stream is None else _AtOnce(stream)]
    logging.captureWarnings(capture=True)
    set_level(level)
    return stream


def set_level(level: str) -> None:
    logging.getLogger("ferrum_rt").setLevel(level.upper())


class _AtOnce(logging.Handler):
    def __init__(self, stream: StandardError) -> None:
        super().__init__()
        self.setFormatter(_JsonLines())
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._stream.write_nowait(self.format(record).encode() + b"\n")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.msg,
            **{name: value for name, value in vars(record).items() if name not in _KNOWN},
        }
        if not record.name.startswith("ferrum_rt."):  # only ours are known to be fixed texts
            line |= {"event": "a message of another package", "at": [f"{record.pathname}:{record.lineno}"]}
        if record.exc_info and record.exc_info[1] is not None:
            line |= _describe(record.exc_info[1])
        # Not msgspec: a path may have bytes that are no text, lone surrogates to Python.
        return json.dumps(line, default=repr)


def _describe(error: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)[-_MAX_FRAMES:]
    return {"error": type(error).__name__, "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}
