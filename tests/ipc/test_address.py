"""The socket's path: what is given, the default, and what no socket can have."""

import os
import socket
from pathlib import Path

import pytest

from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.ipc.address import MAX_PATH_BYTES, socket_path


@pytest.fixture
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_default_lies_in_the_runtime_directory(runtime_directory: Path) -> None:
    """Without a path it is ferrum-rt/default.sock under XDG_RUNTIME_DIR, and nothing is created."""
    assert socket_path() == runtime_directory / "ferrum-rt" / "default.sock"
    assert list(runtime_directory.iterdir()) == []


def test_a_given_path_needs_no_runtime_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given is taken, as text or as a path, whatever the environment says."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere/at/all")
    assert socket_path("/x/y.sock") == socket_path(Path("/x/y.sock")) == Path("/x/y.sock")


def test_a_relative_path_is_made_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path stays what it was when the working directory changes; its .. are left to the kernel, which knows symlinks."""
    monkeypatch.chdir(tmp_path)
    assert socket_path("../a.sock") == tmp_path / ".." / "a.sock"


@pytest.mark.parametrize("value", [None, "", "relative/dir"])
def test_without_a_runtime_directory_a_path_must_be_given(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XDG_RUNTIME_DIR is unset or relative and /run/user has none for us, the error names both and says what to do."""
    if value is None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    with pytest.raises(ConfigError, match=r"XDG_RUNTIME_DIR is not set: /run/user/3999999999: .*give the socket's path"):
        socket_path()


def test_a_runtime_directory_of_somebody_else_is_not_used(runtime_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is another user's, as after su, one that others can write to, and one that is a file are refused by name."""
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999_999)
    with pytest.raises(
        ConfigError, match=f"XDG_RUNTIME_DIR: {runtime_directory} is not a directory of uid 3999999999 alone"
    ):
        socket_path()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_directory))
    runtime_directory.chmod(0o770)
    with pytest.raises(ConfigError, match="alone"):
        socket_path()
    runtime_directory.chmod(0o700)
    (runtime_directory / "file").touch(mode=0o600)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_directory / "file"))
    with pytest.raises(ConfigError, match="alone"):
        socket_path()


def test_the_limit_is_what_the_kernel_takes(tmp_path: Path) -> None:
    """The longest path that passes can be bound; one byte more is refused by name, counted in bytes and not in letters."""
    room = MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - 1
    longest = tmp_path / ("é" * (room // 2) + "x" * (room % 2))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(socket_path(longest)))
    with pytest.raises(ConfigError, match="it has 108 bytes, a Unix socket's at most 107"):
        socket_path(f"{longest}x")
    with socket.socket(socket.AF_UNIX) as bound, pytest.raises(OSError, match="too long"):
        bound.bind(f"{longest}x")


@pytest.mark.parametrize("path", ["", ".", "..", "/", "/tmp/..", "a\0b", "\0abstract"])
def test_a_path_that_names_no_file_is_refused(path: str) -> None:
    """Directories by their nature, and names that the kernel would cut off or take for abstract ones."""
    with pytest.raises(ConfigError, match="it names no file"):
        socket_path(path)
