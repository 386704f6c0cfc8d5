"""What bench.gpu found, for people: ``python -m bench.gpu_report DIR/gpu.json [--results bench/results] [--picture docs]``.

Writes RESULTS/gpu-<device>.json, prints tables for docs/performance.md, and draws PICTURE/gpu-<device>.png where there is
matplotlib. Parts that were cut off are shown as far as they got, and said to be so.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COLOURS = ("#c2410c", "#94a3b8", "#0f766e", "#cbd5e1")


def result_of(found: dict[str, Any], part: str) -> dict[str, Any]:
    """Empty for a part that was not run."""
    result: dict[str, Any] = found["parts"].get(part, {}).get("result", {})
    return result


def device_name(found: dict[str, Any]) -> str:
    return str(result_of(found, "environment").get("device") or "unknown device")


def slug(device: str) -> str:
    """The device as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.removeprefix("NVIDIA ").lower()).strip("-")


def markdown(found: dict[str, Any]) -> str:
    """A section for docs/performance.md."""
    facts = result_of(found, "environment")
    copied = facts.get("copy_bytes_per_s", {}).get("median", 0) / 1e12
    versions = facts.get("machine", {})
    lines = [
        f"## On {device_name(found)}",
        "",
        f"`{found['command']}`: torch {versions.get('torch')}, CUDA {facts.get('torch_cuda')}, FlashInfer "
        f"{facts.get('flashinfer')}, commit {str(facts.get('commit'))[:12]}; random weights in the models' shapes, "
        f"bfloat16. It copies {copied:.2f} TB/s. Medians with the lowest and the highest.",
    ]
    for rows in (_decode, _host, _prompts, _concurrency, _nano, _peer, _long_prefill):
        table = list(rows(found))
        if len(table) > 1:
            lines += ["", *_markdown_table(table)]
    if unlike := [f"{name} ({part['status']})" for name, part in found["parts"].items() if part["status"] != "ok"]:
        lines += ["", f"Not complete: {', '.join(unlike)}."]
    counts = result_of(found, "tests").get("counts")
    if counts:
        lines += [
            "",
            "Tests on the GPU: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + ".",
        ]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: list[list[str]]) -> list[str]:
    header, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return [header, "|" + "---|" * len(rows[0]), *rest]


def _show(value: dict[str, float], digits: int = 1) -> str:
    return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f} to {value['high']:,.{digits}f})"


def _decode(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["one sequence", "ms a step", "share of the copy bandwidth"]
    for model, row in result_of(found, "decode").items():
        share = row.get("share_of_copy_bandwidth")
        yield [model, _show(row["ms_per_step"], 3), f"{100 * share['median']:.0f} %" if share else ""]


def _host(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["µs a step", "batch", "step", "graph alone", "event loop", "executor's thread", "the GPU waits"]
    for model, row in result_of(found, "host").items():
        times = [_show(row[name], 0) for name in ("wall_us", "gpu_us", "loop_thread_us", "executor_thread_us")]
        yield [model, str(row["batch"]), *times, f"{100 * row['gpu_waits']['median']:.0f} %"]


def _prompts(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["64 in, 4 out, many at once", "steps with prompts are", "ms a request", "µs a launch"]
    for model, row in result_of(found, "host").items():
        for kind, times in row["prompts"].items():
            yield [model, kind, _show(times["request_ms"], 2), _show(times["launch_us"], 0)]


def _concurrency(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["256 in, 128 out", "at once", "tokens/s", "first token, ms p50 / p99", "between tokens, ms p50 / p99"]
    for model, rows in result_of(found, "concurrency").items():
        for count, row in rows.items():
            waits = [f"{row[name]['p50']:.1f} / {row[name]['p99']:.1f}" for name in ("first_token_ms", "between_tokens_ms")]
            yield [model, count, _show(row["tokens_per_s"], 0), *waits]


def _nano(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["nano-vllm's workload", "tokens/s", "seconds"]
    for model, row in result_of(found, "nano").items():
        yield [model, f"{row['tokens_per_s']['median']:,.0f}", f"{row['seconds']:.1f}"]


def _peer(found: dict[str, Any]) -> Iterator[list[str]]:
    result = result_of(found, "peer")
    yield ["tokens/s", "requests", "ferrum_rt", str(result.get("peer")), "ours / peer"]
    for model, rows in result.items():
        for label, row in rows.items() if isinstance(rows, dict) else ():
            rates = [_show(rate, 0) for rate in row["tokens_per_s"].values()]
            yield [model, label, *rates, f"**{row['ours_over_peer']['median']:.2f}**"]


def _long_prefill(found: dict[str, Any]) -> Iterator[list[str]]:
    yield ["32k prompt beside 16 decodes", "its first token, s", "others' gap alone, ms p50 / p99", "beside it"]
    for model, row in result_of(found, "long_prefill").items():
        gaps = [f"{gap['p50']:.1f} / {gap['p99']:.1f}" for gap in row["between_tokens_ms"].values()]
        yield [model, f"{row['first_token_s']:.2f}", *gaps]


def draw(found: dict[str, Any], path: Path) -> bool:
    """Tokens per second by requests at once, ours and the peer's. False where there is nothing to draw, or nothing to draw
    with."""
    series = list(_series(found))
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture", file=sys.stderr)
        return False
    if not series:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(model for model, _, _ in series))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.2), layout="constrained", squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for colour, (label, points) in zip(COLOURS, [item[1:] for item in series if item[0] == model], strict=False):
            axis.plot([count for count, _ in points], [rate for _, rate in points], "o-", color=colour, label=label)
        axis.set_title(f"{model}, {device_name(found)}", fontsize=9)
        axis.set_xlabel("requests at once")
        axis.set_ylabel("tokens per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return True


def _series(found: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[int, float]]]]:
    """(model, label, points): what was measured in turns with the peer, else ours alone."""
    beside: set[str] = set()
    for model, rows in result_of(found, "peer").items():
        if isinstance(rows, dict):
            counted = {int(label): row["tokens_per_s"] for label, row in rows.items() if label.isdigit()}
            for engine in next(iter(counted.values()), {}):
                beside.add(model)
                yield model, engine, [(count, rates[engine]["median"]) for count, rates in counted.items()]
    for model, rows in result_of(found, "concurrency").items():
        if model not in beside:
            yield model, "ferrum_rt", [(int(count), row["tokens_per_s"]["median"]) for count, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and a picture of what bench.gpu found.")
    parser.add_argument("found", type=Path, help="gpu.json")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    found = json.loads(args.found.read_bytes())
    if found["settings"]["smoke"]:
        parser.error(f"{args.found}: a smoke run; its figures say nothing")
    name = f"gpu-{slug(device_name(found))}"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{name}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, args.picture / f"{name}.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
