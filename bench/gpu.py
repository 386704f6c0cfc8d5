"""Everything that wants a GPU, in one command, for a machine without a network: docs/gpu.md says how to get it there.

    python -m bench.gpu --all --out DIR [--parts decode nano …] [--vllm PATH] [--aot PATH] [--limit-s 480]
    python -m bench.gpu --smoke         what can be run without a GPU, to see that the command works

Each part runs in a process of its own, which is ended with all that it started when its time is up. DIR/gpu.json is written
before and after each part: what is known by then, and of a part that failed the end of what it said. The parts stand in the
order of what they are worth, for those that find no time left are not run.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench._common import finish, machine, progress
from bench._gpu_toolchain import fallbacks

ROOT = Path(__file__).parent.parent
# Seconds at most, and what is worth running if fewer are left.
LIMITS: dict[str, tuple[float, float]] = {
    "environment": (40, 10),
    "kernels": (200, 30),
    "tests": (150, 30),
    "decode": (100, 30),
    "host": (75, 30),
    "concurrency": (90, 40),
    "nano": (120, 40),
    "long_prefill": (60, 30),
    "busy_host": (60, 30),
    "peer": (240, 60),
}
_SMOKE_GROUPS = (
    ("tests",),
    ("environment", "kernels", "decode", "host", "concurrency", "nano", "long_prefill"),
    ("busy_host",),
    ("peer",),
)
_END = 4000  # characters of what a part said
_PEEK_S = 3.0


def child_environment(cache: Path, out: Path, aot: Path | None, *, is_smoke: bool) -> dict[str, str]:
    """For the parts alone: nothing is set in this process. FlashInfer's norms are to be the CUDA ones, for the others need
    a package that is not there; and what it compiles is to lie where we find it, and later parts do."""
    given = os.environ.get("PYTHONPATH", "").split(":")
    paths = [str(out / "aot"), *([str(aot)] if aot else []), *filter(None, given), str(ROOT)]
    return {
        **os.environ,
        "PYTHONPATH": ":".join(dict.fromkeys(paths)),
        "FLASHINFER_USE_CUDA_NORM": "1",
        "FLASHINFER_CUDA_ARCH_LIST": os.environ.get("FLASHINFER_CUDA_ARCH_LIST") or _arch(),
        "FLASHINFER_WORKSPACE_BASE": str(cache),
        **fallbacks(cache / "stubs"),
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
        # Two engines that take turns would keep each other's threads from the cores.
        **({"OMP_NUM_THREADS": "1"} if is_smoke else {}),
    }


def _arch() -> str:
    """Of the first GPU, as FlashInfer wants it; Hopper's kernels need the ``a``."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        said = []
    capability = said[0] if said else "9.0"
    return f"{capability}a" if int(capability.split(".")[0]) >= 9 else capability


class Run:
    """The parts one after the other, and the file that says what came of them."""

    def __init__(self, args: argparse.Namespace, out: Path, environment: Mapping[str, str]) -> None:
        self._args, self._out, self._environment = args, out, environment
        self._end = time.monotonic() + args.limit_s
        self.found: dict[str, Any] = {
            "bench": "gpu",
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "settings": {"limit_s": args.limit_s, "smoke": args.smoke, "vllm": args.vllm is not None},
            "parts": {name: {"status": "not run"} for name in args.parts},
        }
        (out / "parts").mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        half = self._out / "gpu.json.half"
        half.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        half.replace(self._out / "gpu.json")

    def run(self, names: tuple[str, ...]) -> None:
        """The parts ``names`` in one process."""
        left = self._end - time.monotonic()
        limit = min(sum(LIMITS[name][0] for name in names), left)
        if left < LIMITS[names[0]][1] and not self._args.smoke:
            self._note(names, status="no time left")
            return
        self._note(names, status="cut off with the whole run")
        for name in names:
            (self._out / "parts" / f"{name}.json").unlink(missing_ok=True)
        progress(f"{', '.join(names)}: {limit:.0f} s at most, {left:.0f} left")
        began = time.monotonic()
        log = self._out / "parts" / f"{names[0]}.log"
        status = self._wait(self._start(names, limit, log), names, limit)
        said = log.read_text(encoding="utf-8", errors="replace")[-_END:] if log.is_file() else ""
        for name in names:
            self._take(name, status, said)
        seconds = time.monotonic() - began
        for name in names:
            self.found["parts"][name]["seconds"] = round(seconds, 1)
        self.save()
        progress(f"{', '.join(names)}: {status} after {seconds:.0f} s")
        if status != "ok":
            print(said[-1500:], file=sys.stderr, flush=True)

    def _start(self, names: tuple[str, ...], limit: float, log: Path) -> "subprocess.Popen[bytes]":
        options = {
            "out": str(self._out),
            "is_smoke": self._args.smoke,
            "vllm": str(self._args.vllm) if self._args.vllm else None,
            "limit_s": limit,
            "bandwidth": self._bandwidth(),
        }
        folder = str(self._out / "parts")
        command = [sys.executable, "-m", "bench._gpu_parts", *names, folder, json.dumps(options)]
        with log.open("wb") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, process: "subprocess.Popen[bytes]", names: tuple[str, ...], limit: float) -> str:
        """How it ended. What it has found by then is written again and again, for this process may be ended too."""
        end = time.monotonic() + limit
        status = f"cut off after {limit:.0f} s"
        try:
            while (left := end - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(left, _PEEK_S))
                    status = "ok" if code == 0 else f"failed with exit status {code}"
                    break
                for name in names:
                    self._take(name, "running", "")
                self.save()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
            process.wait()
        return status

    def _take(self, name: str, status: str, said: str) -> None:
        path = self._out / "parts" / f"{name}.json"
        part: dict[str, Any] = {"status": "not reached"}
        if path.is_file():
            part["result"] = json.loads(path.read_bytes())
            part["status"] = "ok" if part["result"].pop("is_done", False) else status
        if part["status"] not in ("ok", "running"):
            part["end_of_output"] = said
        self.found["parts"][name] = part

    def _note(self, names: tuple[str, ...], **fields: Any) -> None:
        for name in names:
            self.found["parts"][name] = fields
        self.save()

    def _bandwidth(self) -> float | None:
        result = self.found["parts"].get("environment", {}).get("result", {})
        copied = result.get("copy_bytes_per_s")
        return copied["median"] if copied else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests and measures everything that wants a GPU.")
    parser.add_argument("--all", action="store_true", help="all parts, the most valuable first")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), help="these alone; environment is always among them")
    parser.add_argument("--out", type=Path, help="where gpu.json, logs and the folder aot go")
    parser.add_argument("--vllm", type=Path, help="a folder of packages with vLLM, to be measured beside us")
    parser.add_argument("--aot", type=Path, help="the folder aot of an earlier run: nothing is compiled again")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "ferrum-flashinfer")
    parser.add_argument("--limit-s", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--smoke", action="store_true", help="without a GPU, on emulations; its figures say nothing")
    args = parser.parse_args()
    if not (args.all or args.parts or args.smoke):
        parser.error("say --all, --parts or --smoke")
    if args.out is None and not args.smoke:
        parser.error("--out: where are the results to go?")
    wanted = args.parts or list(LIMITS)
    args.parts = [name for name in LIMITS if name in wanted or name == "environment"]
    return args


def run_all(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    run = Run(args, out, child_environment(args.cache, out.resolve(), args.aot and args.aot.resolve(), is_smoke=args.smoke))
    groups = _SMOKE_GROUPS if args.smoke else tuple((name,) for name in args.parts)
    for group in groups:
        if names := tuple(name for name in group if name in args.parts):
            run.run(names)
    return run.found


def main() -> None:
    args = parse_arguments()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="ferrum-gpu-") as directory:
        out = (args.out or Path(directory)).resolve()
        found = run_all(args, out)
    for name, part in found["parts"].items():
        print(f"{name:14} {part['status']}")
    finish("gpu", facts, found["settings"], {"parts": found["parts"]})
    if any(part["status"] != "ok" for part in found["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
