"""Where the load benches leave what they have found, besides the terminal."""

import argparse
import importlib.util
import os
from pathlib import Path

import msgspec

from ferrum_rt.cli.options import UsageError
from ferrum_rt.load.results import LoadResult, SweepResult


def check_report(arguments: argparse.Namespace) -> None:
    """What could not be written is said before the load is put on, not after. Raises UsageError, and ConfigError."""
    for option in ("save", "report"):
        path: Path | None = getattr(arguments, option)
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
            raise UsageError(f"argument --{option}: {path}: cannot be written")
    for option in ("report", "plots"):
        if getattr(arguments, option) is not None and importlib.util.find_spec("matplotlib") is None:
            raise UsageError(f"argument --{option}: needs matplotlib; install it with: pip install 'ferrum-rt[plot]'")
    if arguments.plots is not None:
        try:
            arguments.plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"argument --plots: {arguments.plots}: cannot be written: {error.strerror}") from error
    if getattr(arguments, "spans", None) is not None:
        from ferrum_rt.load.spans import read_spans

        if "connect" not in arguments:
            raise UsageError("argument --spans: goes with --connect: of an engine in this process all are recorded anyway")
        read_spans(arguments.spans)


def write_report_files(result: LoadResult | SweepResult, arguments: argparse.Namespace) -> None:
    """All that the options ask for."""
    if arguments.save is not None:
        arguments.save.write_bytes(msgspec.json.encode(result))
    if arguments.report is not None:
        from ferrum_rt.load.report import write_report

        write_report(result, arguments.report)
    if arguments.plots is not None:
        from ferrum_rt.load.figures import write_figures

        write_figures(result, arguments.plots)
