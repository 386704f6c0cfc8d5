"""How near do the native linear layers come to the machine's limits, and to torch?

One matrix of Qwen3-0.6B's size (1,024 in, 6,144 out), as often as it takes to fall out of every cache; rows of x from 1 to
512. Compared are torch (oneDNN's packed matmul, as the engine uses it), and ours in bfloat16 and in int8, on the same number
of threads, in turn, each after a pause. Small batches are bound by reading the weights, large ones by multiplying.

    python -m bench.cpu_linear [--rows 1 4 8 16 32 64 256 512] [--repeats 7] [--threads N] [--smoke]
"""

import argparse
import os
import time
from typing import Any

from bench._common import finish, limit_threads, machine, progress, spread, table

IN, OUT, COPIES = 1024, 6144, 12
TORCH, BF16, INT8 = "torch bf16", "ours bf16", "ours int8"


def measure(rows: list[int], repeats: int, threads: int) -> list[dict[str, Any]]:
    """By number of rows: the microseconds of one multiplication, and ratios within each repeat."""
    import torch

    from ferrum_rt.kernels.cpu import NativeOps, TorchCpuOps, load_kernels
    from ferrum_rt.kernels.cpu.program import Kind

    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("there is no C++ compiler: nothing to measure")
    ours, torchs = NativeOps(kernels, threads), TorchCpuOps()
    weights = [torch.randn(OUT, IN).bfloat16() for _ in range(COPIES)]
    engines: dict[str, Any] = {
        TORCH: (torchs, [torchs.pack_linear(weight, None) for weight in weights]),
        BF16: (ours, [ours.pack_linear(weight, None) for weight in weights]),
        INT8: (ours, [ours.pack(weight, None, Kind.INT8) for weight in weights]),
    }
    results = []
    for count in rows:
        x, out = torch.randn(count, IN).bfloat16(), torch.empty(count, OUT, dtype=torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in range(repeats + 1):
            for name, (ops, packed) in engines.items():
                time.sleep(0.2)  # torch's threads spin for a while after their work
                began = time.perf_counter()
                with torch.inference_mode():
                    for weight in packed:
                        ops.linear(out, x, weight)
                if repeat:  # the first is the warm-up
                    times[name].append((time.perf_counter() - began) / COPIES)
        medians = {name: spread(values).median for name, values in times.items()}
        results.append(
            {
                "rows": count,
                "us": {name: spread(1e6 * value for value in values) for name, values in times.items()},
                "gb_per_s": {name: IN * OUT * (1 if name == INT8 else 2) / 1e9 / medians[name] for name in times},
                "gop_per_s": {name: 2 * count * IN * OUT / 1e9 / medians[name] for name in times},
                "times_torch": {
                    name: spread(theirs / mine for theirs, mine in zip(times[TORCH], times[name], strict=True))
                    for name in (BF16, INT8)
                },
            }
        )
        progress(f"{count} rows: {', '.join(f'{name} {seconds * 1e6:.0f} us' for name, seconds in medians.items())}")
    ours.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="How near do the native linear layers come to the machine's limits?")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.repeats = [1, 8], 1
    limit_threads(args.threads)
    facts = machine()
    results = measure(args.rows, args.repeats, args.threads)
    print(f"{IN} x {OUT}, median (low to high) of {args.repeats} repeats")
    header = ["rows", *(f"{name}, us" for name in (TORCH, BF16, INT8)), "bf16 GB/s", "bf16 GFLOP/s", "int8 GOP/s"]
    header += [f"{name} / torch" for name in (BF16, INT8)]
    print(
        table(
            header,
            [
                [
                    row["rows"],
                    *(row["us"][name].show(0) for name in (TORCH, BF16, INT8)),
                    f"{row['gb_per_s'][BF16]:.1f}",
                    f"{row['gop_per_s'][BF16]:.0f}",
                    f"{row['gop_per_s'][INT8]:.0f}",
                    *(row["times_torch"][name].show(2) for name in (BF16, INT8)),
                ]
                for row in results
            ],
        )
    )
    settings = {"in": IN, "out": OUT, "matrices": COPIES, "threads": args.threads, "repeats": args.repeats}
    finish("cpu_linear", facts, settings, {"results": results})


if __name__ == "__main__":
    main()
