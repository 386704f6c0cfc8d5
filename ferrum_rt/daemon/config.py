"""What the daemon is started with: the parts of an EngineConfig, and a table of its own in the same file."""

import ipaddress
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from ferrum_rt.interfaces.config import ConfigFields, EngineConfig, build_config, check_keys, naming, read_toml
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.ipc.framing import MAX_FRAME_BYTES

_MIB = 1024 * 1024
# What may stand at the top of the file.
_KEYS = dict.fromkeys((*EngineConfig.__struct_fields__, *ConfigFields.__annotations__, "daemon"))


class DaemonLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What clients may take. A *user* is a uid, with all its connections together.

    ``user_tokens`` counts, for each request under way, its prompt and ``max_tokens`` for each output; so it bounds the
    pages that a user can hold. ``user_bytes`` counts requests under way as they were sent, unfinished frames, and output
    that has not been read. Who makes no progress with a frame, or does not read, is cut off after ``stall_s`` seconds.
    """

    connections: int = 512
    connection_requests: int = 256
    connection_output_bytes: int = 16 * _MIB
    frame_bytes: int = MAX_FRAME_BYTES
    stall_s: float = 60.0
    user_connections: int = 384
    user_requests: int = 1024
    user_tokens: int = 8_000_000
    user_bytes: int = 128 * _MIB


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``daemon``. ``socket`` None is the user's own. The daemon's own uid may always connect; ``allowed_uids`` are
    those that may beside it.

    ``otlp`` is where spans and metrics are sent, as ``http://localhost:4318``; ``spans`` a file that spans are appended to,
    a line each, or ``-`` for standard error; ``prometheus`` where metrics can be read: a loopback address and a port, as
    ``127.0.0.1:9464``, or the path of a socket. None of them is the default: nothing is recorded."""

    socket: str | None = None
    allowed_uids: tuple[int, ...] = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp: str | None = None
    spans: str | None = None
    prometheus: str | None = None
    limits: DaemonLimits = DaemonLimits()


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Both halves of the file."""

    engine: EngineConfig
    daemon: DaemonConfig


def load_serve_config(
    path: Path | None, *, model: str | None, daemon: Mapping[str, Any], fields: Mapping[str, Any]
) -> ServeConfig:
    """Read the file, if there is one, and lay the command line over it: the model, fields of the table ``daemon``, and
    keywords of open_runtime. Raises ConfigError."""
    if path is None:
        return _build({}, model, daemon, fields)
    with naming(path):
        return _build(read_toml(path), model, daemon, fields)


def _build(tree: dict[str, Any], model: str | None, daemon: Mapping[str, Any], fields: Mapping[str, Any]) -> ServeConfig:
    check_keys(tree, _KEYS, "")
    table = tree.pop("daemon", {})
    if not isinstance(table, dict):
        raise ConfigError(f"daemon: expected a table, got {table!r}")
    check_keys(table, msgspec.to_builtins(DaemonConfig()), "daemon")
    given = table | dict(daemon)
    return ServeConfig(engine=build_config(model, build_config(None, None, tree), fields), daemon=_convert(given))


def _convert(table: dict[str, Any]) -> DaemonConfig:
    try:
        daemon = msgspec.convert(table, DaemonConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`daemon.")) from error
    for name in DaemonLimits.__struct_fields__:
        value = getattr(daemon.limits, name)
        if not 1 <= value < math.inf:
            raise ConfigError(f"daemon.limits.{name} must be at least 1, got {value}")
    if daemon.limits.frame_bytes > MAX_FRAME_BYTES:
        raise ConfigError(f"daemon.limits.frame_bytes is at most {MAX_FRAME_BYTES}, got {daemon.limits.frame_bytes}")
    if any(uid < 0 for uid in daemon.allowed_uids):
        raise ConfigError(f"daemon.allowed_uids are numbers of users, got {list(daemon.allowed_uids)}")
    _check_telemetry(daemon)
    return daemon


def _check_telemetry(daemon: DaemonConfig) -> None:
    if daemon.otlp is not None and not daemon.otlp.startswith(("http://", "https://")):
        raise ConfigError(f"daemon.otlp is a collector's URL, as http://localhost:4318, got {daemon.otlp!r}")
    if daemon.spans == "":
        raise ConfigError("daemon.spans is the path of a file, or - for standard error, got ''")
    if daemon.prometheus is not None:
        loopback_address(daemon.prometheus)


def loopback_address(text: str) -> tuple[str, int] | None:
    """Of ``daemon.prometheus`` the address and the port; None if it is the path of a socket. Raises ConfigError for an
    address that others than this machine can reach."""
    if "/" in text:
        return None
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        is_loopback, number = ipaddress.ip_address(host).is_loopback, int(port)
    except ValueError:
        is_loopback, number = False, 0
    if not (is_loopback and 0 <= number < 65536):
        raise ConfigError(
            "daemon.prometheus is a loopback address and a port, as 127.0.0.1:9464, or the path of a socket, with a slash "
            f"in it, got {text!r}"
        )
    return host, number


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """The keys in which two configurations differ, dotted."""
    if isinstance(old, msgspec.Struct) and type(old) is type(new):
        return [
            key
            for name in old.__struct_fields__
            for key in difference(getattr(old, name), getattr(new, name), f"{path}.{name}" if path else name)
        ]
    return [] if old == new else [path]
