"""What the commands write to the terminal."""

import os
import sys
from collections.abc import Iterable, Sequence

from ferrum_rt.interfaces.types import ModelInfo


def report_error(error: Exception) -> None:
    """One line on standard error, whatever the message looks like."""
    start = "\r\033[K" if sys.stderr.isatty() else ""  # over a loading bar that was cut short
    print(f"{start}ferrum-rt: error: {one_line(error)}", file=sys.stderr)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def described_model(model: ModelInfo) -> str:
    return f"{model.id} ({model.type.value}, {model.dtype.value}, {model.device.value})"


def facts(named: Iterable[tuple[str, object]]) -> str:
    """A line each."""
    return "\n".join(f"{name:<18}{value}" for name, value in named)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns two spaces apart, the first one flush left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def discard_stdout() -> None:
    """Nobody reads it, or it cannot be written: without this the interpreter would complain when it flushes at its exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
