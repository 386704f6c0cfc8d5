"""The native kernels: compiled when they are first needed, for the processor at hand, and kept in the user's cache; or
compiled ahead, for a named instruction set, and shipped with the package."""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "native"
PREBUILT = Path(__file__).parent / "prebuilt"
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
_LIMIT_S = 300.0

logger = logging.getLogger("ferrum_rt")


class Target(NamedTuple):
    """An instruction set to compile for ahead: the compiler's ``flags``, and what a processor ``needs``, in the words of
    /proc/cpuinfo."""

    flags: tuple[str, ...]
    needs: frozenset[str]


_V3 = frozenset({"lm", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _V4 | {"avx512_bf16", "avx512_vnni"}
_FLAGS_BF16 = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
# The best first.
TARGETS = {
    "x86-64-v4-amx": Target(
        (*_FLAGS_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _BF16 | {"amx_tile", "amx_bf16", "amx_int8"}
    ),
    "x86-64-v4-bf16": Target(_FLAGS_BF16, _BF16),
    "x86-64-v4": Target(("-march=x86-64-v4",), _V4),
    "x86-64-v3-vnni": Target(("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    "x86-64-v3": Target(("-march=x86-64-v3",), _V3),
    "x86-64": Target(("-march=x86-64",), frozenset({"lm"})),
}


class Kernels:
    """The functions of a compiled library, as ``native/module.cpp`` exports them. Each gives the GIL up while it runs.
    Raises OSError or RuntimeError if it cannot be loaded."""

    def __init__(self, library: Path) -> None:
        import tvm_ffi

        module = tvm_ffi.load_module(str(library))
        self.library = library
        self.open_pool: Callable[[int], int] = module["open_pool"]
        self.close_pool: Callable[[int], None] = module["close_pool"]
        self.want_large_pages: Callable[[int, int], None] = module["want_large_pages"]
        self.run: Callable[..., None] = module["run"]
        self.pack_weight: Callable[..., None] = module["pack_weight"]
        self.lanes: int = module["lanes"]()
        self.instruction_set = str(module["instruction_set"]())


@cache
def load_kernels() -> Kernels | None:
    """The kernels for this machine: those that came with the package for its best instruction set; else compiled for it;
    else those that came for a lesser one. None, and one warning, if there are none."""
    features = frozenset(_processor().get("flags", "").split())
    ahead = [partial(built_ahead, name) for name, target in TARGETS.items() if target.needs <= features]
    ways: list[Callable[[], Path | None]] = [*ahead[:1], build_native, *ahead[1:]]
    reasons = []
    for find in ways:
        try:
            if (library := find()) is not None:
                return Kernels(library)
        except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    logger.warning("no native CPU kernels, torch's are used instead, which are slower: %s", "; ".join(reasons))
    return None


def build_native() -> Path:
    """The library for this processor, in the user's cache. Raises as ``build`` does."""
    return build(_cache_directory(), ("-march=native",))


def build(directory: Path, target: tuple[str, ...], compiler: str | None = None) -> Path:
    """The library for the instruction set that the ``target`` flags name, compiled into ``directory`` unless it is there.

    Raises OSError (no compiler, one that fails, a directory that others may write to) or SubprocessError.
    """
    command = _command(compiler or find_compiler(), target)
    version = subprocess.run([command[0], "--version"], check=True, capture_output=True, timeout=_LIMIT_S).stdout
    # What -march=native means hangs on the processor: a home directory may be shared between machines.
    library = directory / f"cpu-{_fingerprint([*command, version.decode(), *_processor().values()])}.so"
    if not library.is_file():
        with _alone(directory):
            if not library.is_file():  # nobody else has compiled it meanwhile
                logger.info("compiling the CPU kernels with %s; this happens once", command[0])
                _compile(command, library)
    return library


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process at a time: a compiler takes all cores for a minute. Where files cannot be locked, all go at once."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)  # which gives the lock back


def build_ahead(name: str) -> Path:
    """The library for ``TARGETS[name]``, compiled into the package in place of an older one. Raises as ``build`` does."""
    library = _path_ahead(name)
    library.parent.mkdir(exist_ok=True)
    _compile(_command(find_compiler(), TARGETS[name].flags), library)
    for other in library.parent.glob(f"{name}.*.so"):
        if other != library:
            other.unlink()
    return library


def built_ahead(name: str) -> Path | None:
    """What ``build_ahead`` has made of these very sources, if it has."""
    library = _path_ahead(name)
    return library if library.is_file() else None


def _path_ahead(name: str) -> Path:
    return PREBUILT / f"{name}.{_fingerprint([*FLAGS, *TARGETS[name].flags])}.so"


def _command(compiler: str, target: tuple[str, ...]) -> list[str]:
    import tvm_ffi.libinfo

    return [compiler, *FLAGS, *target, *(f"-I{path}" for path in tvm_ffi.libinfo.include_paths())]


def _compile(command: list[str], library: Path) -> None:
    """Each source beside the others, aside; then the library is moved into place, so that no other process loads half of
    one."""
    sources = sorted(SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [[*command, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)]
        for _ in threads.map(_run, commands):
            pass
        made = Path(scratch) / library.name
        _run([*command, *objects, "-o", str(made)])
        made.replace(library)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT_S)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise OSError(f"{command[0]} cannot compile them: {first}") from error


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


def _fingerprint(made_with: list[str]) -> str:
    """Of all that the library depends on: ``made_with``, and the sources."""
    parts = [part.encode() for part in made_with]
    parts += [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _processor() -> dict[str, str]:
    """Its model and features, as Linux names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return {"machine": platform.machine(), "processor": platform.processor()}
    fields = {name.strip(): value for name, _, value in (line.partition(":") for line in lines)}
    return {name: fields.get(name, "") for name in ("flags", "Features", "model name")}
