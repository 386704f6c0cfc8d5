"""Where the daemon's socket lies: one answer for the daemon that binds it and the client that connects to it."""

import os
import stat
from pathlib import Path

from ferrum_rt.interfaces.errors import ConfigError

# What sockaddr_un holds on Linux, less the byte of zero at the end.
MAX_PATH_BYTES = 107


def socket_path(path: str | Path | None = None) -> Path:
    """The socket's absolute path: what is given, else ``ferrum-rt/default.sock`` in the user's runtime directory.

    Nothing is created, and whether a daemon is there is not asked. Raises ConfigError for a path that no socket can have, or
    where none is given and this user has no runtime directory.
    """
    place = _runtime_directory() / "ferrum-rt" / "default.sock" if path is None else Path(path)
    if place.name in ("", "..") or "\0" in str(place):
        raise ConfigError(f"socket path {str(path)!r}: it names no file; give one, as in /run/user/1000/llm.sock")
    # Absolute now, for the working directory may be another by the time that the path is used.
    place = place.absolute()
    length = len(os.fsencode(place))
    if length > MAX_PATH_BYTES:
        raise ConfigError(
            f"socket path {place}: it has {length} bytes, a Unix socket's at most {MAX_PATH_BYTES}; give a shorter one"
        )
    return place


def _runtime_directory() -> Path:
    """$XDG_RUNTIME_DIR, else what logind would have set it to. Never a directory in /tmp: whoever comes first owns the name
    there, so that a client could be led to somebody else's daemon."""
    directory, variable = Path(os.environ.get("XDG_RUNTIME_DIR", "")), "XDG_RUNTIME_DIR"
    if not directory.is_absolute():  # unset; or relative, which the XDG specification has ignored
        directory, variable = Path(f"/run/user/{os.geteuid()}"), "XDG_RUNTIME_DIR is not set"
    advice = "give the socket's path, or set XDG_RUNTIME_DIR to a directory that only you can write to"
    try:
        found = directory.stat()
    except OSError as error:
        raise ConfigError(f"{variable}: {directory}: {error.strerror}; {advice}") from error
    # Kept through su or sudo, the variable names the directory of another user.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(f"{variable}: {directory} is not a directory of uid {os.geteuid()} alone; {advice}")
    return directory
