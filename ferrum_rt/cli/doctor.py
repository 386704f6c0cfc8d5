"""ferrum-rt doctor: what this machine has, and whether a model runs on it."""

import argparse
import importlib
import importlib.util
import os
import platform
import shutil

import anyio
import msgspec

import ferrum_rt
from ferrum_rt.cli.machine import installed_version, proc_fields
from ferrum_rt.cli.options import UsageError
from ferrum_rt.cli.output import facts, one_line
from ferrum_rt.interfaces.types import ModelId

_PACKAGES = ("torch", "tokenizers", "msgspec", "anyio", "uvloop")
_OPTIONAL = ("flashinfer", "huggingface_hub")
# FlashInfer compiles each kernel at its first use.
_CUDA_TOOLS = ("nvcc", "ninja")
# The ones that CPU kernels for bfloat16 and int8 choose between.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
_PROMPT, _NUM_TOKENS = "def ", 8


class SelfTest(msgspec.Struct, frozen=True, kw_only=True):
    """A short greedy generation: its text, or what went wrong."""

    ok: bool
    model: ModelId | None = None
    text: str | None = None
    error: str | None = None


class CpuKernels(msgspec.Struct, frozen=True, kw_only=True):
    """The native kernels that the CPU computes with, and the file that they are in."""

    instruction_set: str
    library: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``versions`` of packages that are not installed are None; memory is in bytes; where there are no ``cpu_kernels``
    torch's are used. ``cuda`` is the GPU's name, ``cuda_lacks`` why there is no device cuda, ``cuda_tools`` which tools
    of the compiler are on the PATH."""

    versions: dict[str, str | None]
    importable: dict[str, bool]
    cpu: str
    cores: int
    instruction_sets: dict[str, bool]
    memory_total: int
    memory_available: int
    cpu_kernels: CpuKernels | None
    cuda: str | None
    cuda_lacks: str | None
    cuda_tools: dict[str, bool]
    self_test: SelfTest


def doctor(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if the self test fails. Or compile the CPU kernels, and print where they are."""
    if arguments.build:
        return _build(arguments.target)
    if arguments.target:
        raise UsageError("--target goes with --build")
    report = _examine(arguments.model)
    print(msgspec.json.encode(report).decode() if arguments.json else _as_text(report))
    return 0 if report.self_test.ok else 1


def _build(targets: list[str] | None) -> int:
    from ferrum_rt.kernels.cpu.build import TARGETS, build_ahead, build_native

    for name in targets or ():
        if name not in TARGETS:
            raise UsageError(f"argument --target: {name!r} is none of {', '.join(TARGETS)}")
    libraries = {name: build_ahead(name) for name in targets} if targets else {"native": build_native()}
    print(facts(libraries.items()))
    return 0


def _examine(model: str | None) -> Report:
    cpu, memory = proc_fields("/proc/cpuinfo"), proc_fields("/proc/meminfo")
    flags = cpu.get("flags", "").split()
    return Report(
        versions={
            "python": platform.python_version(),
            "ferrum_rt": ferrum_rt.__version__,
            **{name: installed_version(name) for name in _PACKAGES},
        },
        importable={name: importlib.util.find_spec(name) is not None for name in _OPTIONAL},
        cpu=cpu.get("model name", platform.machine()),
        cores=len(os.sched_getaffinity(0)),
        instruction_sets={name: name in flags for name in _INSTRUCTION_SETS},
        memory_total=_bytes(memory.get("MemTotal")),
        memory_available=_bytes(memory.get("MemAvailable")),
        cpu_kernels=_cpu_kernels(),
        cuda=_cuda_device(),
        cuda_lacks=_what_cuda_lacks(),
        cuda_tools={name: shutil.which(name) is not None for name in _CUDA_TOOLS},
        self_test=_self_test(model),
    )


def _bytes(kibibytes: str | None) -> int:
    return int(kibibytes.removesuffix(" kB")) * 1024 if kibibytes else 0


def _cpu_kernels() -> CpuKernels | None:
    try:
        from ferrum_rt.kernels.cpu import load_kernels

        kernels = load_kernels()
    except Exception:  # a broken torch is what the self test reports
        return None
    if kernels is None:
        return None
    return CpuKernels(instruction_set=kernels.instruction_set, library=str(kernels.library))


def _cuda_device() -> str | None:
    try:
        cuda = importlib.import_module("torch").cuda
        return cuda.get_device_name() if cuda.is_available() else None
    except Exception:  # a broken torch is what the self test reports
        return None


def _what_cuda_lacks() -> str | None:
    try:
        from ferrum_rt.runtime.loading.cuda_backend import what_cuda_lacks

        return what_cuda_lacks()
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"


def _self_test(model: str | None) -> SelfTest:
    try:
        return anyio.run(_generate, model, backend_options={"use_uvloop": True})
    except ferrum_rt.FerrumError as error:
        return SelfTest(ok=False, error=one_line(error))
    except Exception as error:  # whatever is broken here, it belongs in the report
        return SelfTest(ok=False, error=f"{type(error).__name__}: {one_line(error)}")


async def _generate(model: str | None) -> SelfTest:
    async with ferrum_rt.open_runtime(model, monitoring={"progress": True}) as engine:
        response = await engine.infer(_PROMPT, max_tokens=_NUM_TOKENS, temperature=0, ignore_eos=True)
        info = (await engine.status()).model
    if len(response.token_ids) != _NUM_TOKENS:
        return SelfTest(ok=False, error=f"asked for {_NUM_TOKENS} tokens, got {len(response.token_ids)}")
    return SelfTest(ok=True, model=None if info is None else info.id, text=response.text)


def _as_text(report: Report) -> str:
    gib = 2**30
    test, kernels = report.self_test, report.cpu_kernels
    named = {
        **{name: version or "not installed" for name, version in report.versions.items()},
        **{name: "importable" if found else "not installed" for name, found in report.importable.items()},
        "cpu": f"{report.cpu}, {report.cores} cores",
        "instruction sets": " ".join(name for name, found in report.instruction_sets.items() if found) or "none",
        "memory": f"{report.memory_total / gib:.1f} GiB, {report.memory_available / gib:.1f} GiB available",
        "cpu kernels": f"native, {kernels.instruction_set}: {kernels.library}" if kernels else "torch's",
        "cuda": report.cuda or "not available",
        "device cuda": report.cuda_lacks or "can be used",
        "cuda tools": " ".join(name for name, found in report.cuda_tools.items() if found) or "none on the PATH",
        "self test": f"ok: {test.model} continues {_PROMPT!r} with {test.text!r}" if test.ok else f"failed: {test.error}",
    }
    return facts(named.items())
