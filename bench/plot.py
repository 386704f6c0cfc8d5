"""Draws the pictures of the documentation from what the benches printed.

python -m bench.plot        reads bench/results/*.json, writes docs/*.png

Throughput, and the peers on the CPU where bench/results/cpu_peers.json is there.
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
PEER_COLOURS = {"ferrum_rt": "#c2410c", "llama.cpp": "#475569", "OpenVINO": "#94a3b8", "transformers": "#cbd5e1"}


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


def cpu_peers(result: dict[str, Any], path: Path) -> None:
    """Bars of the share of what the machine allows, a panel for each width; on the bars are tokens per second."""
    widths = list(dict.fromkeys(row["width"] for row in result["results"]))
    figure, panels = plt.subplots(len(widths), figsize=(7.2, 2.8 * len(widths)), layout="constrained", squeeze=False)
    for axes, width in zip(panels[:, 0], widths, strict=True):
        rows = [row for row in result["results"] if row["width"] == width]
        _shares_of_limit(axes, rows)
        axes.set_title(width, fontsize=9, loc="left")
        axes.set_xticks(range(len(rows)), [_measure(row) for row in rows], fontsize=8)
        axes.set_ylabel("% of the machine's limit", fontsize=8)
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.1, 1.0), ncols=len(PEER_COLOURS))
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _shares_of_limit(axes: Any, rows: list[dict[str, Any]]) -> None:
    width = 0.84 / len(PEER_COLOURS)
    for number, (engine, colour) in enumerate(PEER_COLOURS.items()):
        shown = [(at, row, row["share_of_limit"][engine]) for at, row in enumerate(rows) if engine in row["share_of_limit"]]
        medians = [100 * share["median"] for _, _, share in shown]
        errors = [
            [100 * (share["median"] - share["low"]) for _, _, share in shown],
            [100 * (share["high"] - share["median"]) for _, _, share in shown],
        ]
        at = [place + (number - (len(PEER_COLOURS) - 1) / 2) * width for place, _, _ in shown]
        bars = axes.bar(at, medians, width * 0.92, yerr=errors, capsize=1.5, label=engine, color=colour)
        rates = [f"{share['median'] * row['limit_tokens_per_s']:.0f}" for _, row, share in shown]
        axes.bar_label(bars, labels=rates, padding=2, fontsize=6)


def _measure(row: dict[str, Any]) -> str:
    return f"prefill\n{row['prompt_tokens']} tokens" if row["measure"] == "prefill" else f"decode\n{row['requests']} at once"


def main() -> None:
    results = ROOT / "bench" / "results"
    throughput(json.loads((results / "throughput.json").read_bytes()), ROOT / "docs" / "throughput.png")
    if (peers := results / "cpu_peers.json").exists():
        cpu_peers(json.loads(peers.read_bytes()), ROOT / "docs" / "cpu_peers.png")


if __name__ == "__main__":
    main()
