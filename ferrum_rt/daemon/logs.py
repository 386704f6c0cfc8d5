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
import traceback
from contextlib import suppress

_MAX_FRAMES = 16
# What every LogRecord has; anything else was given as ``extra``.
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: str) -> None:
    """For a process that is ours: its root logger writes to standard error, warnings and asyncio's complaints included."""
    root = logging.getLogger()
    # Without a standard error there is none to write to: another file may have been given its number.
    root.handlers = [_AtOnce(sys.stderr.fileno()) if sys.stderr is not None else logging.NullHandler()]
    logging.captureWarnings(capture=True)
    set_level(level)


def set_level(level: str) -> None:
    logging.getLogger("ferrum_rt").setLevel(level.upper())


class _AtOnce(logging.Handler):
    """Past Python's own stream, which would keep what it cannot write, to try again when the process ends. A pipe that can
    be written to takes 4 KiB without waiting."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(_JsonLines())
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            if self._poll.poll(0):
                os.write(self._descriptor, self.format(record).encode() + b"\n")


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
