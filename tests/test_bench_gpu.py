"""The command for GPU machines, where there is none: it runs, survives its parts, and its report can be read."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from bench import _gpu_kernels, gpu, gpu_report
from bench._gpu_engines import mixed_requests
from bench._gpu_models import CONFIGS, decode_bytes
from bench._gpu_parts import PARTS, read_test_log

ROOT = Path(__file__).parent.parent


@pytest.mark.proof
def test_smoke(tmp_path: Path) -> None:
    """Every part runs on emulations, and what it found is in the file."""
    command = [sys.executable, "-m", "bench.gpu", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_bytes())["parts"]
    assert json.loads(done.stdout.splitlines()[-1])["parts"].keys() == parts.keys() == PARTS.keys()
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "ok")
    assert parts["decode"]["result"]["Llama-3.1-8B"]["ms_per_step"]["median"] > 0
    assert parts["host"]["result"]["emulated"].keys() >= {"wall_us", "gpu_us", "loop_thread_us", "gpu_waits"}
    assert parts["host"]["result"]["emulated"]["prompts"].keys() == {"pieces", "eager"}
    assert parts["concurrency"]["result"]["Llama-3.1-8B"].keys() == {"1", "4"}
    assert parts["peer"]["result"]["peer"] == "transformers"
    assert parts["peer"]["result"]["Qwen3-0.6B"].keys() == {"1", "nano"}
    assert set(parts["tests"]["result"]["counts"]) <= {"passed", "skipped"}
    assert gpu_report.markdown(json.loads((tmp_path / "gpu.json").read_bytes())).count("\n|---|") == 7


def options(**changes: Any) -> argparse.Namespace:
    values = {"limit_s": 100.0, "smoke": False, "vllm": None, "parts": ["environment", "decode"], **changes}
    return argparse.Namespace(**values)


class Scripted(gpu.Run):
    """Each part is a line of Python, which finds its result's path in ``path``."""

    script = ""

    def _start(self, names: tuple[str, ...], limit: float, log: Path) -> "subprocess.Popen[bytes]":
        path = self._out / "parts" / f"{names[0]}.json"
        command = [sys.executable, "-S", "-c", f"path = {str(path)!r}; {self.script}"]
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def found_in(folder: Path, name: str = "decode") -> dict[str, Any]:
    part: dict[str, Any] = json.loads((folder / "gpu.json").read_bytes())["parts"][name]
    return part


def test_a_part_that_hangs_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended with what it started when its time is up; what it had found and said is in the file."""
    monkeypatch.setitem(gpu.LIMITS, "decode", (0.5, 0.0))
    run = Scripted(options(), tmp_path, {})
    run.script = (
        "import subprocess, time; open(path, 'w').write('{\"known\": 1}'); "
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    )
    run.run(("decode",))
    part = found_in(tmp_path)
    assert (part["result"], part["status"]) == ({"known": 1}, "cut off after 0 s")
    for _ in range(100):  # init has to take it up
        if not _is_running(int(part["end_of_output"])):
            break
        time.sleep(0.01)
    assert not _is_running(int(part["end_of_output"]))
    assert found_in(tmp_path, "environment")["status"] == "not run"


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("open(path, 'w').write('{}'); print('said'); 1 / 0", "failed with exit status 1"),
        ("open(path, 'w').write('{\"is_done\": true}'); print('said'); 1 / 0", "ok"),
        ("print('said')", "not reached"),
        ("open(path, 'w').write('{}'); print('said', flush=True); import os; os.abort()", "failed with exit status -6"),
    ],
    ids=["raises", "raises when it is done", "writes nothing", "crashes"],
)
def test_how_a_part_ends(tmp_path: Path, script: str, status: str) -> None:
    """Its status says it, and so does the end of its output unless all was well."""
    run = Scripted(options(), tmp_path, {})
    run.script = script
    run.run(("decode",))
    assert found_in(tmp_path)["status"] == status
    assert ("said" in found_in(tmp_path).get("end_of_output", "")) == (status != "ok")


def test_no_part_is_begun_that_cannot_end(tmp_path: Path) -> None:
    """With less time left than it is worth starting for, a part is left out, and says so."""
    run = Scripted(options(limit_s=5.0), tmp_path, {})
    run.script = "1 / 0"
    run.run(("decode",))
    assert found_in(tmp_path) == {"status": "no time left"}


def test_flashinfer_is_set_up_for_the_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their environment has what it wants; this process's own has nothing of it."""
    monkeypatch.setenv("PYTHONPATH", "/site")
    made = gpu.child_environment(tmp_path / "cache", tmp_path / "out", tmp_path / "earlier", is_smoke=False)
    assert made["PYTHONPATH"].split(":") == [str(tmp_path / "out" / "aot"), str(tmp_path / "earlier"), "/site", str(ROOT)]
    assert made["FLASHINFER_USE_CUDA_NORM"] == "1"
    assert (tmp_path / "cache" / "stubs" / "libcuda.so").is_file() == bool(made["LIBRARY_PATH"])
    assert not [name for name in os.environ if name.startswith("FLASHINFER_")]


def test_tests_are_counted_while_they_run(tmp_path: Path) -> None:
    """From a log that ends in the middle of a line."""
    log = tmp_path / "tests.log"
    log.write_text(
        "collected 9 items\n\ntests/gpu/test_a.py::test_x[1-a b] PASSED  [ 11%]\ntests/gpu/test_a.py::test_y FAILED [ 22%]\n"
        "tests/gpu/test_a.py::test_z PASSED [ 33%]\ntests/gpu/test_a.py::te"
    )
    read = read_test_log(log)
    assert read["counts"] == {"passed": 2, "failed": 1}
    assert read["not_passed"] == {"tests/gpu/test_a.py::test_y": "failed"}


def test_sizes() -> None:
    """A decode reads what the published models weigh: 8.03, 1.24 and 0.6 billion parameters, less an embedding that is only
    looked up; the workload has the bounds of nano-vllm's."""
    billions = {name: decode_bytes(config) / 2e9 for name, config in CONFIGS.items()}
    assert billions == pytest.approx({"Llama-3.1-8B": 8.03 - 0.525, "Llama-3.2-1B": 1.236, "Qwen3-0.6B": 0.596}, rel=0.002)
    workload = mixed_requests(256, 1024, 151936)
    for lengths in ([len(prompt) for prompt in workload.prompts], workload.num_outputs):
        assert 100 <= min(lengths) < 120
        assert 1000 < max(lengths) <= 1024
    assert workload == mixed_requests(256, 1024, 151936)


# -- compiled kernels -----------------------------------------------------------------------------------------------------


class Missing(Exception):
    """What FlashInfer raises where it may not compile."""

    def __init__(self, name: str) -> None:
        self.spec = argparse.Namespace(name=name)


def test_what_is_to_be_compiled_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module once, though several calls want it; a call that fails otherwise keeps nobody from it."""

    def want(name: str) -> None:
        assert os.environ["FLASHINFER_DISABLE_JIT"] == "1"
        raise Missing(name)

    todo = [_gpu_kernels.Call(name, lambda name=name: want(name)) for name in ("norm", "rope", "norm")]  # type: ignore[misc]
    todo += [_gpu_kernels.Call("broken", lambda: 1 / 0), _gpu_kernels.Call("there", lambda: None)]
    assert list(_gpu_kernels.missing_modules(todo)) == ["norm", "rope"]
    assert "FLASHINFER_DISABLE_JIT" not in os.environ


def build(folder: Path) -> None:
    """As ninja leaves it."""
    (folder / "norm").mkdir(parents=True)
    (folder / "norm" / "norm.so").write_bytes(b"library")
    (folder / "norm" / "norm.cuda.o").write_bytes(b"object")
    log = f"# ninja log v7\n0\t1500\t1\t{folder}/norm/norm.cuda.o\tabc\n1500\t2000\t1\t{folder}/norm/norm.so\tdef\n"
    (folder / ".ninja_log").write_text(log)


def test_libraries_are_kept(tmp_path: Path) -> None:
    """With what their compilation took, and none of the objects."""
    build(tmp_path / "built")
    found: dict[str, Any] = {}
    _gpu_kernels.keep_for_next_time(tmp_path / "built", tmp_path / "aot", "0.6.18", lambda **fields: found.update(fields))
    assert found["object_seconds"] == {"norm": 2.0}
    assert found["library_bytes"] == {"norm": 7}
    files = {str(path.relative_to(tmp_path / "aot")) for path in (tmp_path / "aot").rglob("*") if path.is_file()}
    assert files == {"flashinfer_jit_cache/__init__.py", "flashinfer_jit_cache/norm/norm.so"}


def test_what_an_earlier_run_compiled_is_taken_over(tmp_path: Path) -> None:
    """The folder of this run has the libraries of both; where there was no earlier run, nothing is taken."""
    build(tmp_path / "built")
    package = tmp_path / "aot" / "flashinfer_jit_cache"
    _gpu_kernels.keep_for_next_time(tmp_path / "built", tmp_path / "earlier", "0.6.18", lambda **fields: None)
    (tmp_path / "earlier" / "flashinfer_jit_cache" / "norm").rename(tmp_path / "earlier" / "flashinfer_jit_cache" / "rope")
    for earlier in (tmp_path / "earlier" / "flashinfer_jit_cache", tmp_path / "none", package):
        _gpu_kernels.take_over(earlier, package)
    _gpu_kernels.keep_for_next_time(tmp_path / "built", tmp_path / "aot", "0.6.18", lambda **fields: None)
    assert {path.name for path in package.iterdir()} == {"__init__.py", "norm", "rope"}


@pytest.mark.slow
def test_flashinfer_finds_the_libraries(tmp_path: Path) -> None:
    """The real one, with the folder on its path, takes a module from there and asks no compiler."""
    build(tmp_path / "built")
    version = "import flashinfer; print(flashinfer.__version__)"
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", version], capture_output=True, text=True, check=True)
    _gpu_kernels.keep_for_next_time(tmp_path / "built", tmp_path / "aot", said.stdout.split()[-1], lambda **fields: None)
    script = "from flashinfer.jit.norm import gen_norm_module as make; print(make().is_aot, make().aot_path)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "aot"), "FLASHINFER_CUDA_ARCH_LIST": "9.0a"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    path = tmp_path / "aot" / "flashinfer_jit_cache" / "norm" / "norm.so"
    assert done.stdout.split()[-2:] == ["True", str(path)], done.stderr


# -- the report -----------------------------------------------------------------------------------------------------------


def example() -> dict[str, Any]:
    """Made up by hand."""

    def around(x: float) -> dict[str, float]:
        return {"median": x, "low": 0.9 * x, "high": 1.1 * x}

    waits = {"p50": 1.0, "p99": 2.0, "max": 3.0}
    rates = {"tokens_per_s": around(5000), "first_token_ms": waits, "between_tokens_ms": waits}
    beside = {"tokens_per_s": {"ferrum_rt": around(5100), "vllm": around(4000)}, "ours_over_peer": around(1.275)}
    results: dict[str, Any] = {
        "environment": {"device": "NVIDIA Example 9000", "copy_bytes_per_s": around(3e12), "commit": "0123456789abcdef"},
        "decode": {"Tiny-1B": {"ms_per_step": around(0.5), "share_of_copy_bandwidth": around(0.81)}},
        "concurrency": {"Tiny-1B": {"1": rates, "16": rates}},
        "peer": {"peer": "vllm", "order": "in turns", "Tiny-1B": {"1": beside, "16": beside, "nano": beside}},
    }
    parts: dict[str, Any] = {name: {"status": "ok", "result": result} for name, result in results.items()}
    parts |= {"nano": {"status": "no time left"}, "tests": {"status": "ok", "result": {"counts": {"passed": 3}}}}
    return {"bench": "gpu", "command": "python -m bench.gpu --all", "settings": {"smoke": False}, "parts": parts}


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From an example: the file with the device's name, tables with its figures and what is missing, a picture."""
    given = tmp_path / "gpu.json"
    given.write_text(json.dumps(example()))
    folder = str(tmp_path / "made")
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(given), "--results", folder, "--picture", folder])
    gpu_report.main()
    said = capsys.readouterr().out
    assert "## On NVIDIA Example 9000" in said
    assert "| Tiny-1B | 0.500 (0.450 to 0.550) | 81 % |" in said
    assert "| Tiny-1B | nano | 5,100 (4,590 to 5,610) | 4,000 (3,600 to 4,400) | **1.27** |" in said
    assert "Not complete: nano (no time left)." in said
    assert "3 passed" in said
    assert json.loads((tmp_path / "made" / "gpu-example-9000.json").read_bytes()) == example()
    picture = imread(tmp_path / "made" / "gpu-example-9000.png")
    assert picture.shape[1] > 500
    assert picture.min() < 0.5


def test_a_smoke_run_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures are of emulations: nothing is written."""
    given = tmp_path / "gpu.json"
    given.write_text(json.dumps({**example(), "settings": {"smoke": True}}))
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(given), "--results", str(tmp_path / "made")])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert not (tmp_path / "made").exists()
