"""What FlashInfer's compilation wants and an installation of nvcc alone may lack, as environment variables that compilers
search after everything else."""

import importlib.util
import os
import subprocess
from pathlib import Path

_LIBRARIES = {"libcuda.so": "libcuda.so.1", "libcudart.so": "libcudart.so.13"}
"""What is linked with, and what that asks for."""


def fallbacks(folder: Path) -> dict[str, str]:
    """CUDA's headers as torch's own packages bring them (cublasLt.h, say), and in ``folder`` empty libraries to link with.
    What is linked asks for the driver's and torch's own when it is loaded."""
    spec = importlib.util.find_spec("nvidia")
    packages = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    headers = [str(path) for package in packages for path in sorted(Path(package).glob("*/include"))]
    return {
        # A linker drops libraries of which it finds nothing used, and in an empty one it finds nothing.
        "FLASHINFER_EXTRA_LDFLAGS": "-Wl,--no-as-needed -lcudart -lcuda",
        "CPLUS_INCLUDE_PATH": _after("CPLUS_INCLUDE_PATH", headers),
        "LIBRARY_PATH": _after("LIBRARY_PATH", [str(folder)] if _make_stubs(folder) else []),
    }


def _after(variable: str, paths: list[str]) -> str:
    return ":".join([*filter(None, os.environ.get(variable, "").split(":")), *paths])


def _make_stubs(folder: Path) -> bool:
    """False where there is no compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in _LIBRARIES.items():
        command = ["cc", "-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{wanted}", "-o", str(folder / name)]
        try:
            subprocess.run(command, capture_output=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return False
    return True
