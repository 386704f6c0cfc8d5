"""Draws the pictures of the documentation from what the benches printed.

python -m bench.plot        reads bench/results/*.json, writes docs/*.png
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
LABELS = {
    "ferrum_rt": "ferrum_rt",
    "generate": "transformers generate",
    "continuous batching": "transformers continuous batching",
}
COLOURS = {"ferrum_rt": "#c2410c", "generate": "#94a3b8", "continuous batching": "#cbd5e1"}


def throughput(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens per second by batch size, with the spread of the repeats."""
    rows = result["results"]
    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    width = 0.8 / len(LABELS)
    for number, (engine, label) in enumerate(LABELS.items()):
        spreads = [row["tokens_per_s"][engine] for row in rows]
        medians = [spread["median"] for spread in spreads]
        errors = [
            [spread["median"] - spread["low"] for spread in spreads],
            [spread["high"] - spread["median"] for spread in spreads],
        ]
        at = [row + (number - 1) * width for row in range(len(rows))]
        bars = axes.bar(at, medians, width * 0.92, yerr=errors, capsize=2, label=label, color=COLOURS[engine])
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    axes.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
    axes.set_ylabel("tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=160)


def main() -> None:
    result = json.loads((ROOT / "bench" / "results" / "throughput.json").read_bytes())
    throughput(result, ROOT / "docs" / "throughput.png")


if __name__ == "__main__":
    main()
