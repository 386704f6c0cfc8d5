"""Imports run one way, and what a host imports of us is light."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import ferrum_rt

PACKAGE = Path(ferrum_rt.__file__).parent
MODULES = {
    ".".join(("ferrum_rt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A package → the packages of ours that it may import from.
LAYERS = {
    "interfaces": {"interfaces"},
    "kernels": {"kernels", "interfaces"},
    "ipc": {"ipc", "interfaces"},
    "runtime": {"runtime", "kernels", "interfaces"},
    "daemon": {"daemon", "runtime", "ipc", "kernels", "interfaces"},
    "load": {"load", "runtime", "ipc", "kernels", "interfaces"},
    "cli": {"cli", "load", "daemon", "runtime", "ipc", "kernels", "interfaces"},
}

# A folder of runtime → the others of its folders that it may import from; the last line is what lies beside them.
RUNTIME_FOLDERS = {
    "scheduling": set[str](),
    "text": set[str](),
    "models": set[str](),
    "threads": set[str](),
    "execution": {"models", "threads"},
    "loading": {"text", "models", "execution"},
    "simulation": {"scheduling"},
    "": {"scheduling", "text", "threads", "execution", "loading"},
}


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that ``module`` imports anywhere in its text, and every name that it imports from one."""
    path = MODULES[module]
    return frozenset(_imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package=path.name == "__init__.py"))


def _imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                parts = module.split(".")
                home = ".".join([*parts[: len(parts) - node.level + is_package], home]).removesuffix(".")
            yield home
            yield from (f"{home}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    """``kernels`` for ferrum_rt.kernels.cpu.ops; empty for ferrum_rt itself."""
    return module.split(".")[1] if "." in module else ""


def runtime_folder(module: str) -> str:
    """``text`` for ferrum_rt.runtime.text.grammar; empty for what lies beside the folders."""
    _, *folders, _ = MODULES[module].relative_to(PACKAGE).parts
    return "".join(folders)


def ours(module: str) -> set[str]:
    """The modules of ours that ``module`` imports, but for ``ferrum_rt`` itself, whose lazy exports lead everywhere."""
    return {name for name in imports(module) if name in MODULES} - {"ferrum_rt"}


def reachable(module: str) -> set[str]:
    """The modules of ours that come with ``module``, directly or through others."""
    seen: set[str] = set()
    left = [module]
    while left:
        new = ours(left.pop()) - seen
        seen |= new
        left.extend(new)
    return seen


def in_packages(*names: str) -> list[str]:
    return [module for module in MODULES if package_of(module) in names]


def in_runtime(*folders: str) -> list[str]:
    return [module for module in in_packages("runtime") if runtime_folder(module) in folders]


def test_every_package_has_a_layer() -> None:
    """A package that nobody has placed in the order of layers is not held to it."""
    assert {package_of(module) for module in MODULES} - {""} <= set(LAYERS)


@pytest.mark.parametrize("module", in_packages(*LAYERS))
def test_packages_import_one_way(module: str) -> None:
    """cli, daemon → runtime, ipc → kernels → interfaces; ipc imports neither runtime nor kernels. From the package itself
    nothing is taken but its version: its other names would come through the lazy exports, from any layer."""
    allowed = LAYERS[package_of(module)]
    assert {package_of(name) for name in ours(module)} <= allowed
    assert {name for name in imports(module) if name.startswith("ferrum_rt.") and name.count(".") == 1} <= {
        "ferrum_rt.__version__",
        *(f"ferrum_rt.{package}" for package in allowed),
    }


@pytest.mark.parametrize("module", in_packages("interfaces"))
def test_interfaces_need_only_msgspec(module: str) -> None:
    """The contracts import the standard library and msgspec, nothing else of others."""
    roots = {name.split(".")[0] for name in imports(module)}
    assert roots <= {*sys.stdlib_module_names, "msgspec", "ferrum_rt"}


@pytest.mark.parametrize("module", in_packages("interfaces", "kernels", "ipc", "runtime"))
def test_library_code_is_neutral(module: str) -> None:
    """Library code is written for anyio alone, and for the API of OpenTelemetry alone."""
    forbidden = ("asyncio", "trio", "uvloop", "opentelemetry.sdk", "opentelemetry.exporter")
    assert not [name for name in imports(module) if f"{name}.".startswith(tuple(f"{root}." for root in forbidden))]


@pytest.mark.parametrize("module", in_runtime("scheduling", "simulation"))
def test_scheduling_is_pure(module: str) -> None:
    """The scheduler, the pages and the sequences import neither torch nor anyio, and nothing of ours that does."""
    for name in (module, *reachable(module)):
        assert not {"torch", "anyio"} & {root.split(".")[0] for root in imports(name)}, name


@pytest.mark.parametrize("module", in_packages("runtime"))
def test_folders_of_runtime_import_one_way(module: str) -> None:
    """Inside runtime: the tasks → loading → execution → models, threads; loading → text; the tasks → scheduling."""
    own = runtime_folder(module)
    assert {runtime_folder(name) for name in ours(module) if package_of(name) == "runtime"} <= {own, *RUNTIME_FOLDERS[own]}


@pytest.mark.parametrize("module", MODULES)
def test_imports_have_no_cycles(module: str) -> None:
    """No module needs itself, however many others lie between."""
    assert module not in reachable(module)


def test_the_reader_of_imports() -> None:
    """Imports are found in functions and behind TYPE_CHECKING, absolute and relative."""
    text = """
import a.b, c as d
from e import f
if TYPE_CHECKING:
    from . import g
    from .h import i
def function():
    from ..j import k
    """
    common = {"a.b", "c", "e", "e.f"}
    found = set(_imports(ast.parse(text), "x.y.z", is_package=False))
    assert found == common | {"x.y", "x.y.g", "x.y.h", "x.y.h.i", "x.j", "x.j.k"}
    found = set(_imports(ast.parse(text), "x.y", is_package=True))
    assert found == common | {"x.y", "x.y.g", "x.y.h", "x.y.h.i", "x.j", "x.j.k"}


def run_python(code: str) -> Any:
    """What ``code`` prints, as JSON, in a fresh interpreter that treats warnings as errors."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_import_is_light() -> None:
    """``import ferrum_rt`` loads neither torch nor anything else of weight, and takes less than 0.2 s."""
    code = """
import json, sys, time
start = time.perf_counter()
import ferrum_rt
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(sys.modules)]))
"""
    fastest = 1e9
    for _ in range(3):
        seconds, loaded = run_python(code)
        assert not {"torch", "numpy", "anyio", "asyncio", "tokenizers", "opentelemetry", "jinja2"} & set(loaded)
        fastest = min(fastest, seconds)
    assert fastest < 0.2


@pytest.mark.slow
def test_contracts_and_client_need_no_torch() -> None:
    """The contracts, the client's side of the socket, the scheduler and the pages can be imported without torch."""
    modules = [*in_packages("interfaces", "ipc"), *in_runtime("scheduling", "simulation")]
    loaded = run_python(f"import json, sys, {', '.join(modules)}\nprint(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "tokenizers", "safetensors"} & set(loaded)


@pytest.mark.slow
def test_public_names_resolve_in_a_fresh_process() -> None:
    """Every name in ``__all__`` can be had, whichever is asked for first, and dir() lists them all."""
    code = """
import json, ferrum_rt
print(json.dumps([[n for n in ferrum_rt.__all__ if getattr(ferrum_rt, n, None) is None], dir(ferrum_rt)]))
"""
    missing, listed = run_python(code)
    assert missing == []
    assert set(listed) >= set(ferrum_rt.__all__)


def test_a_client_needs_no_torch() -> None:
    """A process that imports the client has loaded neither torch nor the runtime."""
    code = "import sys, ferrum_rt.ipc.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "ferrum_rt.ipc.client" in loaded
    assert not {"torch", "numpy", "ferrum_rt.runtime", "ferrum_rt.kernels"} & set(loaded)
