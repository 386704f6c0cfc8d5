"""tools.sanitize_kernels finds what it is there for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = Path("ferrum_rt/kernels/cpu/native")
READS_TOO_FAR = ("tile.h", "begin + kStride : granules;", "begin + kStride : granules + 1;")
OVERFLOWS = ("pool.cpp", "step_ = {program,", "volatile int largest = 0x7FFFFFFF; largest = largest + 1; step_ = {program,")
RACES = ("pool.cpp", "done.fetch_add(1, std::memory_order_acq_rel)", "done.fetch_add(1, std::memory_order_relaxed)")


@pytest.mark.proof
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("sanitizer", "spoilt", "says"),
    [
        ("address", READS_TOO_FAR, "heap-buffer-overflow"),
        ("address", OVERFLOWS, "signed integer overflow"),
        ("thread", RACES, "data race"),
    ],
    ids=["reads-too-far", "overflows", "races"],
)
def test_a_spoilt_kernel_is_found(tmp_path: Path, sanitizer: str, spoilt: tuple[str, str, str], says: str) -> None:
    """A read behind a tensor's end, an integer that overflows, a result that is not passed on to other threads: each one is
    reported, and the status is 1."""
    for name in ("ferrum_rt", "tools", "tests/kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    for name in ("pyproject.toml", "tests/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    file, sound, wrong = spoilt
    text = (tmp_path / NATIVE / file).read_text()
    assert text.count(sound) == 1
    (tmp_path / NATIVE / file).write_text(text.replace(sound, wrong))

    done = subprocess.run(
        [sys.executable, "-m", "tools.sanitize_kernels", "--sanitizer", sanitizer, "-k", "spoils_no_other"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert says in done.stderr
