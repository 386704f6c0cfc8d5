"""Native kernels that are compiled ahead: which library is loaded, and what a wheel takes along."""

import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ferrum_rt.cli import main
from ferrum_rt.kernels.cpu import build, load_kernels
from ferrum_rt.kernels.cpu.build import COMPILERS, SOURCES, TARGETS, Kernels

BUILD = sys.modules[build.__module__]
BEST, LESSER = "x86-64-v4", "x86-64"


@pytest.fixture(scope="module")
def compiled() -> Path:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    return kernels.library


@pytest.fixture
def compiler(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only one there is, on a machine of its own, without kernels: it gives out a library that was compiled before."""
    script = tmp_path / "bin" / COMPILERS[0]
    script.parent.mkdir()
    copy, shell = shutil.which("cp"), shutil.which("sh")
    script.write_text(
        f'#!{shell}\nwhile [ $# -gt 1 ]; do shift; done\n[ "$1" = --version ] || {copy} {shlex.quote(str(compiled))} "$1"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(BUILD, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(BUILD, "_processor", lambda: {"flags": " ".join(TARGETS[BEST].needs)})
    load_kernels.cache_clear()
    yield script
    load_kernels.cache_clear()


def loaded() -> Path:
    load_kernels.cache_clear()
    kernels = load_kernels()
    assert kernels is not None
    return kernels.library


def test_two_at_once_compile_once(compiler: Path, tmp_path: Path) -> None:
    """Who comes second waits for the first, and takes what that has compiled."""
    runs = tmp_path / "runs"
    compiler.write_text(compiler.read_text().replace("\nwhile", f"\necho $$ >> {shlex.quote(str(runs))}\nwhile", 1))
    (tmp_path / "kernels").mkdir()
    with ThreadPoolExecutor(4) as threads:
        libraries = set(threads.map(lambda _: build(tmp_path / "kernels", ("-march=native",)), range(4)))
    assert libraries == set((tmp_path / "kernels").glob("*.so"))
    num_asked, num_sources = 4, len(list(SOURCES.glob("*.cpp")))
    assert len(runs.read_text().split()) == num_asked + num_sources + 1  # for its version; and it links


def test_the_best_that_came_with_the_package_is_loaded(compiler: Path, tmp_path: Path) -> None:
    """Not what the processor cannot run; what it can is taken without a compiler, the best of all before one is asked."""
    for name in TARGETS:
        BUILD.build_ahead(name)
    assert loaded() == BUILD.built_ahead(BEST)
    assert not (tmp_path / "cache").exists()
    compiler.unlink()
    assert loaded() == BUILD.built_ahead(BEST)


def test_a_lesser_one_is_for_who_has_no_compiler(compiler: Path, tmp_path: Path) -> None:
    """What is compiled here is faster than what came for an older processor."""
    BUILD.build_ahead(LESSER)
    assert loaded().is_relative_to(tmp_path / "cache")
    compiler.unlink()
    assert loaded() == BUILD.built_ahead(LESSER)


@pytest.mark.slow
def test_one_that_cannot_be_loaded_is_passed_over(compiler: Path, tmp_path: Path) -> None:
    """It may have been linked for another system."""
    BUILD.build_ahead(BEST).write_bytes(b"\x7fELF")
    assert loaded().is_relative_to(tmp_path / "cache")


def test_one_of_other_sources_is_not_loaded(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the sources change it is as if it were not there, and the next one takes its place."""
    sources = tmp_path / "native"
    shutil.copytree(SOURCES, sources)
    old = BUILD.build_ahead(BEST)
    monkeypatch.setattr(BUILD, "SOURCES", sources)
    with open(sources / "simd.h", "a") as file:
        file.write("// changed\n")
    assert BUILD.built_ahead(BEST) is None
    assert loaded().is_relative_to(tmp_path / "cache")
    new = BUILD.build_ahead(BEST)
    assert list((tmp_path / "prebuilt").iterdir()) == [new] != [old]


def test_doctor_says_what_it_has_built(compiler: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each target with its library, or one with this processor's."""
    assert main(["doctor", "--build", "--target", BEST, "--target", LESSER]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [[name, str(BUILD.built_ahead(name))] for name in (BEST, LESSER)]

    assert main(["doctor", "--build"]) == 0
    name, library = capsys.readouterr().out.split()
    assert name == "native"
    assert Kernels(Path(library)).lanes >= 4


@pytest.mark.proof
def test_a_target_of_features_compiles(tmp_path: Path) -> None:
    """The compiler knows its flags. (Those of the others are in test_native_linear and test_native_amx.)"""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    target = TARGETS["x86-64-v4-bf16"]
    library = build(tmp_path, target.flags)
    if target.needs <= set(BUILD._processor().get("flags", "").split()):
        assert Kernels(library).instruction_set == "avx512 with bf16 and vnni"


@pytest.mark.slow
def test_a_wheel_has_sources_and_libraries(tmp_path: Path) -> None:
    """Everything that the kernels are compiled from, and what was compiled ahead, though git does not know of it."""
    root = Path(__file__).parents[2]
    for file in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(root / file, tmp_path / file)
    ignored = shutil.ignore_patterns("demo_model", "__pycache__", "prebuilt")
    shutil.copytree(root / "ferrum_rt", tmp_path / "ferrum_rt", ignore=ignored)
    cpu = tmp_path / "ferrum_rt" / "kernels" / "cpu"
    (cpu / "prebuilt").mkdir()
    (cpu / "prebuilt" / "x86-64.0.so").touch()

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run([*command, "-w", str(tmp_path), str(tmp_path)], check=True, timeout=120)

    (wheel,) = tmp_path.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    wanted = [path for path in cpu.rglob("*") if path.suffix in (".cpp", ".h", ".so")]
    assert {path.suffix for path in wanted} == {".cpp", ".h", ".so"}
    assert {str(path.relative_to(tmp_path)) for path in wanted} <= found
