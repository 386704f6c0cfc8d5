"""Run the native kernels under the compiler's sanitizers.

    python -m tools.sanitize_kernels

runs tests/kernels/test_native_*.py with kernels that look at each of their accesses and operations (AddressSanitizer,
UndefinedBehaviorSanitizer), and then a program that does nothing but use the thread pool, as ThreadSanitizer watches.
--sanitizer takes one of the two; what else is given goes to pytest. The exit status is 1 if anything was found.

The tests build the kernels as they always do, with the first compiler on the PATH; here that is a script, which adds the
flags. Torch and Python are not compiled anew: their memory is watched because the sanitizer's allocator is loaded first.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from ferrum_rt.kernels.cpu.build import COMPILERS, FLAGS, SOURCES, find_compiler

ROOT = Path(__file__).parent.parent
TESTS = "tests/kernels"
STRESS = ROOT / "tests" / "kernels" / "pool_stress.cpp"
# -O1 compiles in half the time, and -g1 says the line.
COMMON = ("-g1", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
MEMORY, THREADS = "address", "thread"
FLAGS_OF = {MEMORY: ("-fsanitize=address,undefined", *COMMON), THREADS: ("-fsanitize=thread", *COMMON)}
LIMIT_S = 3600.0


def main(argv: list[str] | None = None) -> int:
    arguments, for_pytest = _parser().parse_known_args(argv)
    compiler = find_compiler()
    checks = {
        MEMORY: lambda work: watch_memory(compiler, work, for_pytest),
        THREADS: lambda work: watch_threads(compiler, work),
    }
    names = [arguments.sanitizer] if arguments.sanitizer else list(checks)
    with tempfile.TemporaryDirectory() as work:
        return max(checks[name](Path(work)) for name in names)


def watch_memory(compiler: str, work: Path, for_pytest: list[str]) -> int:
    """The tests, in a process that has the sanitizers' libraries before any other."""
    _write_compiler(work / "bin" / COMPILERS[0], compiler, FLAGS_OF[MEMORY])
    libraries = [_library(compiler, name) for name in ("libasan.so", "libubsan.so")]
    environment = {
        **os.environ,
        "PATH": f"{work / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(work / "cache"),
        "LD_PRELOAD": " ".join(libraries),
        # Python leaves memory to the system when it ends. Freed memory is not kept for long: tensors are large.
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob("test_native_*.py"))
    # A report goes to file descriptor 2, which pytest would take along when the process ends.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider", *tests, *for_pytest]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=LIMIT_S).returncode
    if not any((work / "cache").rglob("*.so")):  # the tests are skipped where there are no kernels
        raise SystemExit("the kernels were not compiled with these flags")
    return min(1, abs(status))


def watch_threads(compiler: str, work: Path) -> int:
    """The pool and the kernels in a program of their own: Python is not built for this sanitizer."""
    program = work / "pool_stress"
    sources = [STRESS, *(path for path in sorted(SOURCES.glob("*.cpp")) if path.name != "module.cpp")]
    flags = [flag for flag in FLAGS if flag != "-shared"]
    command = [compiler, *flags, "-march=native", *FLAGS_OF[THREADS], f"-I{SOURCES}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return min(1, abs(subprocess.run([program], env=environment, check=False, timeout=LIMIT_S).returncode))


def _write_compiler(script: Path, compiler: str, flags: tuple[str, ...]) -> None:
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.quote(compiler)} "$@" {shlex.join(flags)}\n')
    script.chmod(0o755)


def _library(compiler: str, name: str) -> str:
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True, timeout=LIMIT_S
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{compiler} has no {name}: install its sanitizers")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sanitize_kernels", description="Run the native kernels under sanitizers.", epilog="Other options are pytest's."
    )
    parser.add_argument("--sanitizer", choices=list(FLAGS_OF), help="this one alone; both if left out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
