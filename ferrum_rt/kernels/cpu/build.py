"""The native kernels: compiled when they are first needed, for the processor at hand, and kept in the user's cache."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
_LIMIT_S = 300.0

logger = logging.getLogger("ferrum_rt")


class Kernels:
    """The functions of a compiled library, as ``native/module.cpp`` exports them. Each gives the GIL up while it runs."""

    def __init__(self, library: Path) -> None:
        import tvm_ffi

        module = tvm_ffi.load_module(str(library))
        self.open_pool: Callable[[int], int] = module["open_pool"]
        self.close_pool: Callable[[int], None] = module["close_pool"]
        self.want_large_pages: Callable[[int, int], None] = module["want_large_pages"]
        self.run: Callable[..., None] = module["run"]
        self.pack_weight: Callable[..., None] = module["pack_weight"]
        self.lanes: int = module["lanes"]()


@cache
def load_kernels() -> Kernels | None:
    """The kernels for this machine; None, and one warning, where they cannot be compiled."""
    try:
        return Kernels(build(_cache_directory(), ("-march=native",)))
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("no native CPU kernels, torch's are used instead, which are slower: %s", error)
        return None


def build(directory: Path, target: tuple[str, ...], compiler: str | None = None) -> Path:
    """The library for the instruction set that the ``target`` flags name, compiled into ``directory`` unless it is there.

    Raises OSError (no compiler, a directory that others may write to) or SubprocessError.
    """
    import tvm_ffi.libinfo

    compiler = compiler or find_compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    command = [compiler, *FLAGS, *target, *(f"-I{path}" for path in tvm_ffi.libinfo.include_paths())]
    library = directory / f"cpu-{_fingerprint(command)}.so"
    if library.is_file():
        return library
    logger.info("compiling the CPU kernels with %s; this happens once", compiler)
    # Compiled aside and moved into place, so that no other process loads half a library.
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = Path(scratch) / library.name
        try:
            subprocess.run(
                [*command, *map(str, sources), "-o", str(made)], check=True, capture_output=True, timeout=_LIMIT_S
            )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise OSError(f"{compiler} cannot compile them: {first}") from error
        made.replace(library)
    return library


def find_compiler() -> str:
    """The first on the PATH. Raises OSError if there is none."""
    for name in COMPILERS:
        if (path := shutil.which(name)) is not None:
            return path
    raise OSError(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")


def _cache_directory() -> Path:
    """Only we may write to it: what lies there is loaded into the process."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "ferrum_rt" / "kernels"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{directory} can be written to by others; remove it, or set XDG_CACHE_HOME")
    return directory


def _fingerprint(command: list[str]) -> str:
    """Of all that the library depends on: sources, flags, compiler, processor."""
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True, timeout=_LIMIT_S).stdout
    parts: list[Any] = [" ".join(command).encode(), version, _processor().encode()]
    parts += [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What -march=native means here: a home directory may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.machine() + platform.processor()
    return "".join(
        next((line for line in lines if line.startswith(name)), "") for name in ("flags", "Features", "model name")
    )
