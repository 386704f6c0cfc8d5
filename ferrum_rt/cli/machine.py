"""What a measurement, or a report of trouble, depends on: the machine and what is installed on it."""

import os
import platform
from pathlib import Path

import ferrum_rt


def machine() -> dict[str, object]:
    """Facts to keep beside figures. Call it before measuring: it notes how busy others keep the machine."""
    return {
        "cpu": proc_fields("/proc/cpuinfo").get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "ferrum_rt": ferrum_rt.__version__,
        **{package: found for package in ("torch", "uvloop") if (found := installed_version(package)) is not None},
    }


def proc_fields(path: str) -> dict[str, str]:
    """The ``name: value`` lines of a file under /proc; where a name comes again (each core has its own), the last."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}  # not Linux
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def installed_version(package: str) -> str | None:
    from importlib import metadata  # 13 ms to import, which other commands do without

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
