"""The systemd units say what the daemon relies on."""

import configparser
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ferrum_rt.cli import ERROR
from ferrum_rt.daemon.config import DaemonLimits, load_serve_config
from ferrum_rt.daemon.service import ENGINE_FAILED
from ferrum_rt.interfaces.config import SchedulerConfig

UNITS = Path(__file__).parent.parent / "packaging" / "systemd"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    with open(UNITS / name) as file:
        parser.read_file(file)
    return parser


def test_the_socket_is_where_clients_look() -> None:
    """In the user's runtime directory, under the name that connect() takes by default, for this user alone; and taken away
    by systemd, for the daemon leaves it."""
    section = unit("ferrum-rt.socket")["Socket"]
    assert section["ListenStream"] == "%t/ferrum-rt/default.sock"
    assert (section["DirectoryMode"], section["SocketMode"]) == ("0700", "0600")
    assert section["RemoveOnStop"] == "yes"
    assert "Accept" not in section


def test_the_service_uses_what_the_daemon_tells() -> None:
    """Readiness, reload by SIGHUP, the watchdog; restarted for a failed engine and not for a wrong configuration; with more
    time to stop than the drain takes."""
    parser = unit("ferrum-rt.service")
    section = parser["Service"]
    assert section["Type"] == "notify"
    assert section["ExecReload"] == "kill -HUP $MAINPID"
    assert int(section["WatchdogSec"]) > 10
    assert section["Restart"] == "on-failure"
    assert section["RestartPreventExitStatus"] == str(ERROR)
    assert str(ENGINE_FAILED) not in section["RestartPreventExitStatus"]
    assert int(section["TimeoutStopSec"]) > SchedulerConfig().drain_s + 60
    assert section["ExecStart"].endswith("/ferrum-rt serve")
    assert "MemoryDenyWriteExecute" not in section  # oneDNN writes its kernels as it goes
    assert parser["Unit"]["Requires"] == "ferrum-rt.socket"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a complaint, once the command is one that is there."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("ferrum-rt.service", "ferrum-rt.socket"):
        text = (UNITS / name).read_text().replace("%h/.local/bin/ferrum-rt", sys.executable)
        (tmp_path / name).write_text(text)
    units = [str(tmp_path / "ferrum-rt.service"), str(tmp_path / "ferrum-rt.socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", *units], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_sample_configuration_is_the_default() -> None:
    """It loads, names every limit, and says of each what it is when it is left out."""
    path = UNITS.parent / "ferrum-rt.toml"
    config = load_serve_config(path, model=None, daemon={}, fields={})
    assert config == load_serve_config(None, model=None, daemon={}, fields={})
    assert set(tomllib.loads(path.read_text())["daemon"]["limits"]) == set(DaemonLimits.__struct_fields__)
