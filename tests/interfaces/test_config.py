"""What an engine is opened with: parts, shortcuts, files, and messages that name what is wrong."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ferrum_rt.interfaces.config import (
    BackendConfig,
    ConfigFields,
    EngineConfig,
    KvCacheConfig,
    ModelConfig,
    SchedulerConfig,
    TokenizerConfig,
    build_config,
    load_config,
)
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from ferrum_rt.interfaces.types import DataType, Device

SHORTCUTS = {"device", "dtype", "kv_dtype", "max_model_len", "load_format"}


def build(**fields: Any) -> EngineConfig:
    return build_config(None, None, fields)


def test_nothing_given_is_the_default() -> None:
    """Without a model, a base or a field, the result is EngineConfig()."""
    assert build() == EngineConfig()


def test_keywords_are_the_parts_and_the_shortcuts() -> None:
    """The typed keywords of open_runtime are all parts of EngineConfig but the model, and the shortcuts."""
    parts = set(EngineConfig.__struct_fields__) - {"model"}
    assert set(ConfigFields.__annotations__) == parts | SHORTCUTS


def test_parts_as_dict_or_struct() -> None:
    """A part given as a dict equals the same part given as its Struct."""
    as_dict = build(scheduler={"max_running_requests": 8}, backend={"device": "cpu", "dtype": "float16"})
    as_struct = build(
        scheduler=SchedulerConfig(max_running_requests=8),
        backend=BackendConfig(device=Device.CPU, dtype=DataType.FLOAT16),
    )
    assert as_dict == as_struct
    assert as_dict.scheduler == SchedulerConfig(max_running_requests=8)
    assert as_dict.backend.device is Device.CPU


def test_shortcuts() -> None:
    """Each shortcut sets one field of one part, as its name or as an enum's member."""
    config = build(device="cpu", dtype="bfloat16", kv_dtype=KvDtypeKind.FP8, max_model_len=100, load_format="dummy")
    assert config == EngineConfig(
        backend=BackendConfig(device=Device.CPU, dtype=DataType.BFLOAT16),
        kv_cache=KvCacheConfig(dtype=KvDtypeKind.FP8),
        model=ModelConfig(max_model_len=100, load_format="dummy"),
    )


def test_shortcut_beside_its_part() -> None:
    """A shortcut and the part it belongs to can be given together, and neither loses what the other says."""
    config = build(device="cpu", backend={"dtype": "float32"})
    assert config.backend == BackendConfig(device=Device.CPU, dtype=DataType.FLOAT32)


def test_fields_are_laid_over_the_base() -> None:
    """A field changes what it names and leaves the rest of the base, which is itself not changed."""
    base = build(scheduler={"max_running_requests": 8, "drain_s": 3.0}, device="cpu")
    config = build_config("a/model", base, {"scheduler": {"drain_s": 1.0}, "dtype": None})
    assert config.scheduler == SchedulerConfig(max_running_requests=8, drain_s=1.0)
    assert config.model.source == "a/model"
    assert base.scheduler.drain_s == 3.0
    assert base.model.source is None


def test_the_base_keeps_its_model() -> None:
    """No model given leaves the base's."""
    base = build_config("a/model", None, {})
    assert build_config(None, base, {}).model.source == "a/model"


@pytest.mark.parametrize(
    ("fields", "path", "nearest"),
    [
        ({"schedular": {}}, "schedular", "scheduler"),
        ({"max_model_length": 5}, "max_model_length", "max_model_len"),
        ({"scheduler": {"max_runing_requests": 1}}, "scheduler.max_runing_requests", "max_running_requests"),
        ({"kv_cache": {"blocksize": 1}}, "kv_cache.blocksize", "block_size"),
        ({"model": {"tokenizer": {"special_tokens": True}}}, "model.tokenizer.special_tokens", "add_special_tokens"),
    ],
)
def test_unknown_key(fields: dict[str, Any], path: str, nearest: str) -> None:
    """An unknown key is an error that gives its path and the nearest valid key."""
    with pytest.raises(ConfigError) as caught:
        build(**fields)
    assert f"'{path}'" in str(caught.value)
    assert f"did you mean '{nearest}'?" in str(caught.value)


def test_key_that_is_no_string() -> None:
    """A key that is not even a string is an error too."""
    with pytest.raises(ConfigError, match=r"'scheduler\.1'"):
        build(scheduler={1: 2})


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"scheduler": 8}, "scheduler"),
        ({"scheduler": None}, "scheduler"),
        ({"scheduler": object()}, "scheduler"),
        ({"scheduler": {"drain_s": object()}}, "scheduler"),
        ({"scheduler": {"max_running_requests": True}}, "scheduler.max_running_requests"),
        ({"scheduler": {"max_running_requests": 8.0}}, "scheduler.max_running_requests"),
        ({"scheduler": SchedulerConfig(drain_s="soon")}, "scheduler.drain_s"),  # type: ignore[arg-type]
        ({"model": {"tokenizer": 5}}, "model.tokenizer"),
        ({"device": "gpu"}, "backend.device"),
        ({"device": None}, "backend.device"),
        ({"device": object()}, "backend.device"),
        ({"dtype": "bf16"}, "backend.dtype"),
        ({"kv_dtype": "fp4"}, "kv_cache.dtype"),
        ({"max_model_len": "7"}, "model.max_model_len"),
        ({"load_format": "pickle"}, "model.load_format"),
    ],
)
def test_wrong_type(fields: dict[str, Any], path: str) -> None:
    """A value of the wrong type is an error that names its key."""
    with pytest.raises(ConfigError) as caught:
        build(**fields)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "model.max_model_len",
        "scheduler.max_running_requests",
        "scheduler.max_waiting_requests",
        "scheduler.min_prefill_tokens",
        "scheduler.ageing_steps",
        "scheduler.max_sessions",
        "backend.num_threads",
        "sampling.max_tokens",
        "kv_cache.block_size",
        "kv_cache.num_pages",
        "memory.kv_cache_bytes",
        "batching.max_batched_tokens",
        "batching.stream_capacity",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_positive(path: str, value: int) -> None:
    """A count of 0 or less is an error that names its key and the value."""
    part, field = path.split(".")
    with pytest.raises(ConfigError, match=f"{path} must be at least 1, got {value}"):
        build(**{part: {field: value}})


def test_every_count_is_checked() -> None:
    """No field that holds an integer is left out of the test above, but ``swap_bytes``, which may be 0."""
    config = build()
    counts = {
        f"{part}.{field.name}"
        for part in EngineConfig.__struct_fields__
        for field in msgspec.structs.fields(getattr(config, part))
        if field.type in (int, int | None)
    }
    marks = test_counts_are_positive.pytestmark  # type: ignore[attr-defined]
    assert counts - {"memory.swap_bytes"} == set(next(mark.args[1] for mark in marks if mark.args[0] == "path"))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_drain_time_is_a_time(value: float) -> None:
    """The drain time is finite and not negative."""
    with pytest.raises(ConfigError, match=r"scheduler\.drain_s"):
        build(scheduler={"drain_s": value})


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_utilization_is_a_fraction(value: float) -> None:
    """The part of a GPU's memory that may be used is above 0 and at most 1."""
    with pytest.raises(ConfigError, match=r"memory\.utilization"):
        build(memory={"utilization": value})


def test_a_step_has_room_for_every_running_request() -> None:
    """A step too small for one token of each running request is an error that names both numbers."""
    with pytest.raises(ConfigError, match=r"max_batched_tokens \(10\).*max_running_requests \(64\)"):
        build(batching={"max_batched_tokens": 10})


def test_config_is_frozen() -> None:
    """Nothing in a configuration can be changed."""
    config = build()
    with pytest.raises(AttributeError):
        config.scheduler = SchedulerConfig()  # type: ignore[misc]
    for part in EngineConfig.__struct_fields__:
        struct = getattr(config, part)
        with pytest.raises(AttributeError):
            setattr(struct, struct.__struct_fields__[0], None)
    with pytest.raises(AttributeError):
        config.model.tokenizer.add_special_tokens = False  # type: ignore[misc]


def test_config_survives_a_round_trip() -> None:
    """A configuration written as JSON reads back as the same one."""
    config = build(device="cpu", kv_dtype="int8", model={"tokenizer": TokenizerConfig(add_special_tokens=False)})
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_file(tmp_path: Path) -> None:
    """A TOML file has a table per part, and equals the same fields given as keywords."""
    path = write(
        tmp_path / "ferrum.toml",
        """
        [model]
        source = "/models/small"
        [model.tokenizer]
        add_special_tokens = false
        [scheduler]
        max_running_requests = 8
        [kv_cache]
        dtype = "int8"
        """,
    )
    assert load_config(path) == build(
        model=ModelConfig(source="/models/small", tokenizer=TokenizerConfig(add_special_tokens=False)),
        scheduler=SchedulerConfig(max_running_requests=8),
        kv_cache=KvCacheConfig(dtype=KvDtypeKind.INT8),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[scheduler", "not valid TOML"),
        ("[scheduler]\nmax_runing_requests = 8", "did you mean 'max_running_requests'?"),
        ("[model.tokenizer]\nspecial_tokens = true", "'model.tokenizer.special_tokens'"),
        ("scheduler = 8", "scheduler: expected a dict"),
        ("[scheduler]\nmax_running_requests = 'all'", "`scheduler.max_running_requests`"),
        ("[batching]\nstream_capacity = 0", "batching.stream_capacity must be at least 1"),
        ("[scheduler]\ndrain_s = 2026-01-01", "scheduler.drain_s"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, says: str) -> None:
    """What is wrong in a file is an error that names the file and the key."""
    path = write(tmp_path / "ferrum.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    """A file that is missing, is a directory or is not text is an error that names it."""
    (tmp_path / "latin.toml").write_bytes(b"[model]\nsource = '\xe9'")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"{path}: ")
