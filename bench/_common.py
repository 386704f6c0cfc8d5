"""What the benches share: medians with their spread, tables, the facts of the machine, and the closing JSON line."""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ferrum_rt.cli.machine import installed_version, proc_fields

_STARTED = time.monotonic()


class Spread(NamedTuple):
    """One quantity over several repeats."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 1) -> str:
        """``median (low to high)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def spread(values: Iterable[float]) -> Spread:
    known = sorted(values)
    return Spread(statistics.median(known), known[0], known[-1])


def quantile(values: Iterable[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of the others do not exceed."""
    known = sorted(values)
    return known[min(len(known) - 1, int(share * len(known)))]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns wide enough for their cells: the first one flush left, the others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def progress(text: str) -> None:
    """A line on standard error, with the seconds since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


PACKAGES = ("torch", "transformers", "anyio", "uvloop")


def machine() -> dict[str, Any]:
    """What the figures depend on. Call it before measuring: it notes how busy the machine is by others."""
    return {
        "cpu": proc_fields("/proc/cpuinfo").get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := installed_version(package)) is not None},
    }


def limit_threads(count: int) -> None:
    """How many threads torch computes with in this process and in those it starts. It reads this when it is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already")
    os.environ["OMP_NUM_THREADS"] = str(count)


def finish(bench: str, facts: Mapping[str, Any], settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Print the last line: one JSON object with the command, the machine, the settings and the results."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    line = {"bench": bench, "command": command, "machine": facts, "settings": settings, **results}
    print(json.dumps(plain(line)))


def qwen3_config(**changes: Any) -> dict[str, Any]:
    """The config.json of Qwen3-0.6B, but without an end token, with ``changes``."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        **changes,
    }


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}
"""Changes to ``qwen3_config`` for a smoke run."""


def plain(value: Any) -> Any:
    """As JSON has it: a Spread by its fields' names, and of each figure as many digits as can mean something."""
    if isinstance(value, Spread):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
