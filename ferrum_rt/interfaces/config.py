"""What an engine is opened with. Frozen: nothing here is changed after the start, and what is derived lives elsewhere."""

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec

from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.kv_dtype import KvDtypeKind
from ferrum_rt.interfaces.types import DataType, Device, Priority


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How text becomes tokens. ``add_special_tokens`` lets the tokenizer put its own (such as BOS) around a text prompt."""

    add_special_tokens: bool = True


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model. ``source`` is a directory or a hub id; None is the demo model. ``dummy`` loads random weights.

    ``max_model_len`` limits prompt and output together, in tokens; None takes the model's own limit, or what the KV
    cache can hold if that is less.
    """

    source: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    max_model_len: int | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()


class ClientPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client is due: a share by ``weight`` of the tokens, where clients compete. And what it may have: a priority (a
    higher one that it asks for is this), requests under way, tokens of prompts that wait (None: no limit of its own), and of
    the KV pages a share."""

    weight: float = 1.0
    max_priority: Literal["low", "normal", "high", "critical"] = "critical"
    max_requests: int | None = None
    max_queued_tokens: int | None = None
    max_page_share: float = 1.0

    def allowed(self, priority: Priority) -> Priority:
        """What a request that asks for ``priority`` gets."""
        return min(priority, Priority[self.max_priority.upper()])


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many requests at once. Past ``max_waiting_requests`` a new one is refused with ResourceExhausted. At shutdown
    those under way have ``drain_s`` seconds to finish.

    Beside requests that decode, so much of others' prompts is prefilled that a step takes about ``itl_target_s`` seconds,
    which is then the time between two tokens; at least ``min_prefill_tokens``. A request that has waited for
    ``ageing_steps`` steps goes up a priority. ``clients`` are policies by client id, ``default_client`` is the others'.

    What a session has computed is kept for ``session_ttl_s`` seconds after its last use, of at most ``max_sessions``
    sessions, as long as no request needs the pages.
    """

    max_running_requests: int = 64
    max_waiting_requests: int = 1024
    drain_s: float = 10.0
    itl_target_s: float = 0.1
    min_prefill_tokens: int = 64
    ageing_steps: int = 512
    default_client: ClientPolicy = ClientPolicy()
    clients: dict[str, ClientPolicy] = {}
    session_ttl_s: float = 300.0
    max_sessions: int = 256

    def policy(self, client_id: str) -> ClientPolicy:
        """What holds for a client."""
        return self.clients.get(client_id, self.default_client)


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request gets that does not say."""

    max_tokens: int = 256


class BackendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to compute and in what type; ``dtype`` None takes the checkpoint's own, ``int8`` is for the CPU. There
    ``num_threads`` compute; None is one for each core that torch counts, or as many as OMP_NUM_THREADS says."""

    device: Device = Device.AUTO
    dtype: DataType | None = None
    num_threads: int | None = None


class KvCacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Pages of ``block_size`` tokens. ``num_pages`` None derives the number from the memory part; ``dtype`` None takes
    the activations'. Clients see only prefixes of their own unless ``shared_prefixes`` is set: a hit is faster, so it tells
    what others have asked."""

    block_size: int = 16
    num_pages: int | None = None
    dtype: KvDtypeKind | None = None
    prefix_caching: bool = True
    shared_prefixes: bool = False


class MemoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``kv_cache_bytes`` bounds the page pool. None: a quarter of the machine's available memory, at most what the
    running requests could ever fill. The memory is touched only as pages are used.

    On a GPU the pool also fits in what is left of ``utilization``, a fraction of the whole GPU's memory, besides weights,
    the largest step and what others use there.

    Pages of preempted requests, and of sessions that others take them from, may be swapped to ``swap_bytes`` of the host's
    memory, where that is faster than computing them again. None is 0: on the CPU it would be a copy from memory to memory,
    and on CUDA it is not done yet.
    """

    kv_cache_bytes: int | None = None
    utilization: float = 0.9
    swap_bytes: int | None = None


class BatchingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``max_batched_tokens`` bounds one step; longer prompts are prefilled in chunks beside the decoding requests.
    ``stream_capacity`` chunks may wait for a reader before its sequence is parked."""

    max_batched_tokens: int = 512
    stream_capacity: int = 64


class MonitoringConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``progress`` draws a bar on standard error while a model loads, if that is a terminal. ``capture_content`` puts
    prompts and outputs into spans, for whoever may read those."""

    progress: bool = False
    capture_content: bool = False


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration, in parts."""

    model: ModelConfig = ModelConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    sampling: SamplingDefaults = SamplingDefaults()
    backend: BackendConfig = BackendConfig()
    kv_cache: KvCacheConfig = KvCacheConfig()
    memory: MemoryConfig = MemoryConfig()
    batching: BatchingConfig = BatchingConfig()
    monitoring: MonitoringConfig = MonitoringConfig()


class ConfigFields(TypedDict, total=False):
    """The keywords of open_runtime: EngineConfig's parts, as the Struct or a dict, and shortcuts."""

    scheduler: SchedulerConfig | dict[str, Any]
    sampling: SamplingDefaults | dict[str, Any]
    backend: BackendConfig | dict[str, Any]
    kv_cache: KvCacheConfig | dict[str, Any]
    memory: MemoryConfig | dict[str, Any]
    batching: BatchingConfig | dict[str, Any]
    monitoring: MonitoringConfig | dict[str, Any]
    device: str
    dtype: str | None
    kv_dtype: str | None
    max_model_len: int | None
    load_format: str


# A shortcut keyword of open_runtime → the part and the field it stands for.
_SHORTCUTS = {
    "device": ("backend", "device"),
    "dtype": ("backend", "dtype"),
    "kv_dtype": ("kv_cache", "dtype"),
    "max_model_len": ("model", "max_model_len"),
    "load_format": ("model", "load_format"),
}
# Tables whose keys are the user's.
_BY_NAME = ("scheduler.clients",)
_POSITIVE = (
    ("model", "max_model_len"),
    ("scheduler", "max_running_requests"),
    ("scheduler", "max_waiting_requests"),
    ("scheduler", "min_prefill_tokens"),
    ("scheduler", "ageing_steps"),
    ("scheduler", "max_sessions"),
    ("sampling", "max_tokens"),
    ("backend", "num_threads"),
    ("kv_cache", "block_size"),
    ("kv_cache", "num_pages"),
    ("memory", "kv_cache_bytes"),
    ("batching", "max_batched_tokens"),
    ("batching", "stream_capacity"),
)


def build_config(model: str | None, base: EngineConfig | None, fields: Mapping[str, Any]) -> EngineConfig:
    """Lay ``model`` and the keyword ``fields`` (parts as Struct or dict, or shortcuts) over ``base``.

    Raises ConfigError naming the key at fault, and the nearest valid one for an unknown key.
    """
    tree: dict[str, Any] = msgspec.to_builtins(base or EngineConfig())
    for key, value in fields.items():
        if key in _SHORTCUTS:
            part, field = _SHORTCUTS[key]
            tree[part][field] = value
        elif key in tree:
            try:
                given = msgspec.to_builtins(value)
            except TypeError as error:
                raise ConfigError(f"{key}: {error}") from error
            if not isinstance(given, dict):
                raise ConfigError(f"{key}: expected a dict or a Struct, got {value!r}")
            check_keys(given, tree[key], key)
            tree[key] |= given
        else:
            raise ConfigError(_unknown(key, [*tree, *_SHORTCUTS], key))
    if model is not None:
        tree["model"]["source"] = str(model)
    return _convert(tree)


def load_config(path: Path) -> EngineConfig:
    """Read an EngineConfig from a TOML file with one table per part."""
    with naming(path):
        return build_config(None, None, read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError, without naming the file, for one that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"not valid TOML: {error}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ConfigError inside says which file it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(tree: dict[str, Any]) -> EngineConfig:
    try:
        config = msgspec.convert(tree, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error).replace("`$.", "`")) from error
    for part, field in _POSITIVE:
        value = getattr(getattr(config, part), field)
        if value is not None and value < 1:
            raise ConfigError(f"{part}.{field} must be at least 1, got {value}")
    tokens, requests = config.batching.max_batched_tokens, config.scheduler.max_running_requests
    if tokens < requests:
        raise ConfigError(
            f"batching.max_batched_tokens ({tokens}) must be at least scheduler.max_running_requests ({requests}): each "
            "running request decodes one token a step"
        )
    if config.memory.swap_bytes is not None and config.memory.swap_bytes < 0:
        raise ConfigError(f"memory.swap_bytes must be at least 0, got {config.memory.swap_bytes}")
    if not 0 < config.memory.utilization <= 1:
        raise ConfigError(f"memory.utilization must be above 0 and at most 1, got {config.memory.utilization}")
    if not 0 <= config.scheduler.drain_s < math.inf:
        raise ConfigError(f"scheduler.drain_s must be a number of seconds, got {config.scheduler.drain_s}")
    _check_policies(config.scheduler)
    return config


def _check_policies(config: SchedulerConfig) -> None:
    if not config.itl_target_s > 0:
        raise ConfigError(f"scheduler.itl_target_s must be a number of seconds above 0, got {config.itl_target_s}")
    if not config.session_ttl_s > 0:
        raise ConfigError(f"scheduler.session_ttl_s must be a number of seconds above 0, got {config.session_ttl_s}")
    policies = {f"clients.{name}": policy for name, policy in config.clients.items()}
    for name, policy in {"default_client": config.default_client, **policies}.items():
        if not 0 < policy.weight < math.inf:
            raise ConfigError(f"scheduler.{name}.weight must be above 0, got {policy.weight}")
        if not 0 < policy.max_page_share <= 1:
            raise ConfigError(f"scheduler.{name}.max_page_share must be above 0 and at most 1, got {policy.max_page_share}")
        for field in ("max_requests", "max_queued_tokens"):
            value = getattr(policy, field)
            if value is not None and value < 1:
                raise ConfigError(f"scheduler.{name}.{field} must be at least 1, got {value}")


def check_keys(given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
    """Raises ConfigError for a key at any depth of ``given`` that ``known`` has not, naming the nearest that it has.
    ``path`` is where the two stand, empty at the top."""
    for key, value in given.items():
        place = f"{path}.{key}" if path else key
        if key not in known:
            raise ConfigError(_unknown(key, known, place))
        if isinstance(value, dict) and isinstance(known[key], dict) and place not in _BY_NAME:
            check_keys(value, known[key], place)


def _unknown(key: str, known: Any, path: str) -> str:
    nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)
    return f"unknown configuration key {path!r}; did you mean {nearest[0]!r}?"
