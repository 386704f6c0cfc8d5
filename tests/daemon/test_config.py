"""What the daemon is started with: one file for engine and daemon, with the command line laid over it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ferrum_rt.daemon.config import (
    DaemonConfig,
    DaemonLimits,
    ServeConfig,
    difference,
    load_serve_config,
    loopback_address,
)
from ferrum_rt.interfaces.config import EngineConfig, SchedulerConfig
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.types import Device

BOTH = """
[model]
source = "/models/small"
[scheduler]
drain_s = 2.5
[daemon]
socket = "/run/user/1000/llm.sock"
allowed_uids = [1001, 1002]
log_level = "debug"
[daemon.limits]
connections = 7
stall_s = 1.5
"""


def load(path: Path | None, *, model: str | None = None, fields: dict[str, Any] | None = None, **daemon: str) -> ServeConfig:
    return load_serve_config(path, model=model, daemon=daemon, fields=fields or {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ferrum.toml"


def test_no_file_is_the_default() -> None:
    """Without a file and options both halves are their defaults."""
    assert load(None) == ServeConfig(engine=EngineConfig(), daemon=DaemonConfig())


def test_both_halves_are_read(file: Path) -> None:
    """The table daemon is the daemon's, with its limits below it; all others are the engine's, as open_runtime has them."""
    file.write_text(BOTH)
    config = load(file)
    assert config.daemon == DaemonConfig(
        socket="/run/user/1000/llm.sock",
        allowed_uids=(1001, 1002),
        log_level="debug",
        limits=DaemonLimits(connections=7, stall_s=1.5),
    )
    assert config.engine.model.source == "/models/small"
    assert config.engine.scheduler == SchedulerConfig(drain_s=2.5)


@pytest.mark.parametrize("text", ["", "[daemon]\n", "[daemon.limits]\n"])
def test_either_half_may_be_missing(text: str, file: Path) -> None:
    """An empty file and empty tables are the defaults."""
    file.write_text(text)
    assert load(file) == load(None)


def test_the_command_line_overrules_the_file(file: Path) -> None:
    """Model, fields of the table daemon and keywords of open_runtime replace what the file says, and leave the rest."""
    file.write_text(BOTH)
    config = load(file, model="other", socket="/run/other.sock", spans="-", fields={"device": "cpu"})
    assert config.engine.model.source == "other"
    assert config.engine.backend.device is Device.CPU
    assert config.engine.scheduler.drain_s == 2.5
    assert (config.daemon.socket, config.daemon.spans) == ("/run/other.sock", "-")
    assert config.daemon.limits.connections == 7


def test_the_command_line_needs_no_file() -> None:
    """Model, socket and keywords count without one."""
    config = load(None, model="some", socket="s", fields={"scheduler": {"drain_s": 1.0}})
    assert (config.engine.model.source, config.daemon.socket, config.engine.scheduler.drain_s) == ("some", "s", 1.0)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("[daemon]\nsoket = 'x'", "daemon.soket", "socket"),
        ("[daemon.limits]\nuser_conections = 3", "daemon.limits.user_conections", "user_connections"),
        ("[daemon.limit]\nconnections = 3", "daemon.limit", "limits"),
        ("[scheduler]\ndrain = 3", "scheduler.drain", "drain_s"),
        ("[deamon]\nsocket = 'x'", "deamon", "daemon"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(text: str, key: str, nearest: str, file: Path) -> None:
    """At any depth, in both halves; and the message begins with the file."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value) == f"{file}: unknown configuration key {key!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("daemon = 3", "daemon: expected a table"),
        ("[daemon]\nsocket = 3", "daemon.socket"),
        ("[daemon]\nlimits = 3", "daemon.limits"),
        ("[daemon]\nlog_level = 'loud'", "daemon.log_level"),
        ("[daemon]\nallowed_uids = ['root']", "daemon.allowed_uids"),
        ("[daemon]\nallowed_uids = [1, -1]", "daemon.allowed_uids"),
        ("[daemon]\notlp = 'localhost:4318'", "daemon.otlp is a collector's URL"),
        ("[daemon]\nspans = ''", "daemon.spans"),
        ("[daemon.limits]\nconnections = 'many'", "daemon.limits.connections"),
        ("[daemon.limits]\nframe_bytes = 4194305", "daemon.limits.frame_bytes is at most 4194304"),
        ("[daemon.limits]\nstall_s = nan", "daemon.limits.stall_s"),
        ("[daemon.limits]\nstall_s = inf", "daemon.limits.stall_s"),
        ("[scheduler]\ndrain_s = 'long'", "scheduler.drain_s"),
        ("[daemon", "not valid TOML"),
        ("x = " + "[" * 20_000, "not valid TOML"),
    ],
)
def test_a_wrong_value_names_its_key(text: str, names: str, file: Path) -> None:
    """What a value may not be is an error that begins with the file and names the key."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert names in str(caught.value)


@pytest.mark.parametrize("name", DaemonLimits.__struct_fields__)
def test_every_limit_is_at_least_1(name: str, file: Path) -> None:
    """No limit may be 0, which would be a daemon that serves nobody."""
    file.write_text(f"[daemon.limits]\n{name} = 0")
    with pytest.raises(ConfigError, match=rf"daemon\.limits\.{name} must be at least 1, got 0"):
        load(file)


@pytest.mark.parametrize("kind", ["missing", "directory", "not text"])
def test_a_file_that_cannot_be_read_is_named(kind: str, file: Path) -> None:
    """So is one that is not there, or that is no text."""
    if kind == "directory":
        file.mkdir()
    elif kind == "not text":
        file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_a_wrong_option_needs_no_file_to_blame() -> None:
    """Without a file the message begins with what is wrong."""
    with pytest.raises(ConfigError, match=r"^unknown configuration key 'devise'"):
        load(None, fields={"devise": "cpu"})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("127.1.2.3:0", ("127.1.2.3", 0)),
        ("localhost:9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("/run/user/1000/metrics.sock", None),
        ("./metrics.sock", None),
    ],
)
def test_metrics_are_read_on_loopback_or_a_socket(text: str, place: tuple[str, int] | None) -> None:
    """An address of this machine's alone with a port, or what has a slash in it."""
    assert loopback_address(text) == place
    assert load(None, prometheus=text).daemon.prometheus == text


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0:9464",
        "192.168.1.2:9464",
        "[::]:9464",
        "example.org:9464",
        ":9464",
        "127.0.0.1",
        "127.0.0.1:65536",
        "9464",
        "",
    ],
)
def test_metrics_are_read_nowhere_else(text: str, file: Path) -> None:
    """Not where other machines could read them."""
    file.write_text(f"[daemon]\nprometheus = '{text}'")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: daemon.prometheus is a loopback address and a port, ")


def test_differences_are_named_to_the_last_key(file: Path) -> None:
    """Changed keys are dotted, in the order of the fields, to whatever depth; a list is one value; what is the same is not
    named."""
    file.write_text(BOTH)
    old = load(file)
    file.write_text(BOTH.replace("1002", "1003").replace("2.5", "3.5").replace("= 7", "= 8").replace("debug", "info"))
    new = load(file)
    assert difference(old, old) == []
    assert difference(old, new) == [
        "engine.scheduler.drain_s",
        "daemon.allowed_uids",
        "daemon.log_level",
        "daemon.limits.connections",
    ]
    tokenizer = msgspec.structs.replace(new.engine.model.tokenizer, add_special_tokens=False)
    model = msgspec.structs.replace(new.engine.model, tokenizer=tokenizer, source=None)
    assert difference(new.engine, msgspec.structs.replace(new.engine, model=model)) == [
        "model.source",
        "model.tokenizer.add_special_tokens",
    ]
