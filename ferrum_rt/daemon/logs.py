"""The daemon's log: one JSON object a line on standard error.

Nothing that a client sent is in it, nor what a model answered: of an error that was not foreseen there is the type and the
place, not the message, for that may quote either.
"""

import datetime
import logging
import sys
import traceback

import msgspec

# What every LogRecord has; anything else was given as ``extra``.
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: str) -> None:
    """For a process that is ours: its root logger writes to standard error, warnings and asyncio's complaints included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    logging.captureWarnings(capture=True)
    set_level(level)


def set_level(level: str) -> None:
    logging.getLogger("ferrum_rt").setLevel(level.upper())


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
        return msgspec.json.encode(line, enc_hook=repr).decode()


def _describe(error: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)
    return {"error": type(error).__name__, "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}
