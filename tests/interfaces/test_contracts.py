"""docs/contracts.md tells the truth: every name of the seed is there, and what implements a Protocol has its members."""

import ast
import enum
import importlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NewType

import msgspec
import pytest
import torch

from ferrum_rt.interfaces.kv_dtype import KvDtype
from ferrum_rt.interfaces.tensor import TensorLike

if TYPE_CHECKING:
    from ferrum_rt.interfaces.engine import InferenceEngine
    from ferrum_rt.interfaces.kv_cache import KvCacheManager
    from ferrum_rt.interfaces.model_executor import ModelExecutor
    from ferrum_rt.interfaces.sampler import Sampler
    from ferrum_rt.interfaces.scheduler import Scheduler
    from ferrum_rt.interfaces.tensor import TensorFactory, TensorOps
    from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer, Tokenizer, TokenizerFactory
    from ferrum_rt.kernels.cpu import NativeOps, TorchCpuOps
    from ferrum_rt.kernels.cuda.ops import CudaOps
    from ferrum_rt.kernels.reference import ReferenceOps
    from ferrum_rt.runtime.execution.cuda_executor import CudaExecutor
    from ferrum_rt.runtime.execution.executor import DecoderExecutor
    from ferrum_rt.runtime.execution.sampler import BatchSampler
    from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
    from ferrum_rt.runtime.runtime import Runtime
    from ferrum_rt.runtime.scheduling.pages import PagedKvCache
    from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
    from ferrum_rt.runtime.text.detokenizer import IncrementalDecoder, WindowDecoder
    from ferrum_rt.runtime.text.tokenizer import HfTokenizer

    # What the tests below see of a signature is its names; mypy compares the types here.
    _engine: type[InferenceEngine] = Runtime
    _cache: type[KvCacheManager] = PagedKvCache
    _executors: tuple[type[ModelExecutor], ...] = (DecoderExecutor, CudaExecutor)
    _sampler: type[Sampler[torch.Tensor]] = BatchSampler
    _scheduler: type[Scheduler] = UnifiedScheduler
    _factory: type[TensorFactory[torch.Tensor]] = ReferenceOps
    _ops: tuple[type[TensorOps[torch.Tensor]], ...] = (ReferenceOps, TorchCpuOps, NativeOps, CudaOps)
    _tensor: type[TensorLike] = torch.Tensor
    _tokenizer: type[Tokenizer] = HfTokenizer
    _tokenizers: type[TokenizerFactory] = HfTokenizerFactory
    _incremental: tuple[type[IncrementalTokenizer], ...] = (IncrementalDecoder, WindowDecoder)

CONTRACTS = Path(__file__).parents[2] / "docs" / "contracts.md"

# Every public name of the seed (the documentation of the crate ferrum-interfaces), by the module it comes from.
SEED = {
    "engine": ["InferenceEngine"],
    "kv_cache": ["AllocationRequest", "BlockTable", "CacheHandleStats", "KvCacheHandle", "KvCacheManager"],
    "kv_dtype": ["KvBf16", "KvDtypeKind", "KvFp16", "KvFp8", "KvInt8"],
    "model_executor": ["DecodeInput", "DecodeOutput", "ModelExecutor", "PrefillInput", "PrefillOutput"],
    "sampler": ["LogitsProcessor", "Sampler", "SamplingConfig", "SamplingContext"],
    "scheduler": ["BatchHint", "BatchPlan", "Scheduler as SchedulerInterface"],
    "tensor": ["TensorFactory", "TensorLike", "TensorOps", "TensorRef"],
    "tokenizer": ["IncrementalTokenizer", "Tokenizer", "TokenizerFactory", "TokenizerInfo"],
}
SEED_STRUCTS = [
    "BackendConfig",
    "BatchId",
    "ClientId",
    "ComponentHealth",
    "ComponentStatus",
    "EngineConfig",
    "EngineMetrics",
    "EngineStatus",
    "HealthStatus",
    "InferenceRequest",
    "InferenceResponse",
    "MemoryUsage",
    "ModelId",
    "ModelInfo",
    "RequestId",
    "SamplingParams",
    "SchedulerConfig",
    "SchedulerStats",
    "SessionId",
    "SpecialTokens",
    "StreamChunk",
    "TaskId",
    "TokenId",
    "TokenizerConfig",
]
SEED_ENUMS = ["DataType", "Device", "FerrumError", "FinishReason", "ModelSource", "ModelType", "Priority"]
SEED_NAMES = [
    *(name for module, names in SEED.items() for name in (module, *(f"{module}::{name}" for name in names))),
    *SEED_STRUCTS,
    *SEED_ENUMS,
]


class Row(NamedTuple):
    """One line of the table: paths as they are written, ``planned`` those that do not exist yet."""

    seed: str
    ours: str
    is_data: bool
    implementations: list[str]
    mentioned: list[str]
    planned: list[str]


def read_rows(text: str) -> list[Row]:
    """The rows of the table in docs/contracts.md."""
    rows = []
    for line in text.splitlines():
        match = re.fullmatch(r"\| `([^`]+)`(?: \(module\))? \| `([^`]+)` \| (.+) \|", line)
        if match is None:
            continue
        first, *notes = match[3].split("; ")
        is_planned = [part.startswith("planned:") for part in (first, *notes)]
        rows.append(
            Row(
                seed=match[1],
                ours=match[2],
                is_data=first == "data",
                implementations=[] if is_planned[0] else re.findall(r"`([^`]+)`", first),
                mentioned=[
                    path for part in notes if not part.startswith("planned:") for path in re.findall(r"`([^`]+)`", part)
                ],
                planned=[
                    path or part
                    for part in (first, *notes)
                    if part.startswith("planned:")
                    for path in re.findall(r"`([^`]+)`", part) or [""]
                ],
            )
        )
    return rows


ROWS = read_rows(CONTRACTS.read_text(encoding="utf-8"))


def full_name(path: str) -> str:
    return path if path.split(".")[0] in ("torch", "tests") else f"ferrum_rt.{path}"


def resolve(path: str) -> Any:
    """The module or the member of a module that a path in the table names."""
    name = full_name(path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, member = name.rpartition(".")
        return getattr(importlib.import_module(home), member)


def is_protocol(thing: object) -> bool:
    return bool(getattr(thing, "_is_protocol", False))


def protocol_members(protocol: type) -> set[str]:
    """The public names that a class must have to satisfy ``protocol``."""
    bases = [base for base in protocol.__mro__ if is_protocol(base) and base.__module__ != "typing"]
    names = {name for base in bases for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    return {name for name in names if not name.startswith("_")}


def instance_attributes(implementation: type) -> Iterator[str]:
    """What the methods of a class, or of one it inherits from, set on ``self``."""
    for base in implementation.__mro__:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue  # not written in Python
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    yield name


def mismatches(protocol: type, implementation: type) -> list[str]:
    """What ``implementation`` lacks of ``protocol``, in words."""
    problems = []
    attributes = set(instance_attributes(implementation))
    for name in sorted(protocol_members(protocol)):  # "wanted" is None for what is declared by a type alone
        wanted, found = getattr(protocol, name, None), getattr(implementation, name, None)
        if not hasattr(implementation, name) and name not in attributes:
            problems.append(f"{name} is missing")
        elif callable(wanted) and inspect.isfunction(found):
            problems.extend(f"{name}: {problem}" for problem in signature_mismatches(wanted, found))
        elif callable(wanted) and not callable(found):
            problems.append(f"{name} is not a method")
    return problems


def signature_mismatches(wanted: Callable[..., Any], found: Callable[..., Any]) -> Iterator[str]:
    """Whether every call that ``wanted`` allows, by position or by name, is one that ``found`` takes."""
    if inspect.iscoroutinefunction(wanted) != inspect.iscoroutinefunction(found):
        yield "one is a coroutine function, the other is not"
    theirs, ours = (inspect.signature(function).parameters for function in (wanted, found))
    for name, parameter in theirs.items():
        if name not in ours:
            yield f"the parameter {name!r} is missing"
        elif ours[name].kind is not parameter.kind:
            yield f"the parameter {name!r} is {ours[name].kind.description}, not {parameter.kind.description}"
    positional = [[name for name, p in side.items() if p.kind is p.POSITIONAL_OR_KEYWORD] for side in (theirs, ours)]
    if positional[1][: len(positional[0])] != positional[0]:
        yield f"the parameters come in the order {positional[1]}, not {positional[0]}"
    for name, parameter in ours.items():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name not in theirs and parameter.default is parameter.empty and not is_variadic:
            yield f"the parameter {name!r} is not part of the Protocol and has no default"


def test_every_seed_name_has_one_row() -> None:
    """Each name of the seed has exactly one row, in the seed's order, and there are no others."""
    assert [row.seed for row in ROWS] == SEED_NAMES


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.seed)
def test_our_name_exists(row: Row) -> None:
    """What the seed's name became can be imported, and keeps the name."""
    assert resolve(row.ours) is not None
    assert row.ours.split(".")[-1] == re.split("::", row.seed)[-1].removesuffix(" as SchedulerInterface")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.seed)
def test_row_is_of_the_right_kind(row: Row) -> None:
    """A Protocol has classes that implement it or a place where one will be; everything else is data or a module."""
    ours = resolve(row.ours)
    if is_protocol(ours):
        assert not row.is_data
        assert row.implementations or row.planned
        assert all(inspect.isclass(resolve(path)) for path in row.implementations)
    elif isinstance(ours, ModuleType):
        assert row.is_data or all(isinstance(resolve(path), ModuleType) for path in row.implementations)
    else:
        assert row.is_data
        kinds = (msgspec.Struct, enum.Enum, KvDtype, Exception)
        assert isinstance(ours, NewType) or issubclass(ours, kinds)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.seed)
def test_row_names_what_exists(row: Row) -> None:
    """Every path in a row can be imported, unless it is planned; then it is a module of ours that is not there yet."""
    for path in (*row.implementations, *row.mentioned):
        assert resolve(path) is not None
    for path in row.planned:
        assert re.fullmatch(r"(cli|daemon|ipc|kernels|runtime)(\.[a-z_]+)*", path), f"{path!r} is not a module's path"
        assert not exists(path), f"{path} is there now: name the class"


def exists(path: str) -> bool:
    try:
        return importlib.util.find_spec(full_name(path)) is not None
    except ModuleNotFoundError:  # not even its package is there
        return False


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [(row.ours, path) for row in ROWS if is_protocol(resolve(row.ours)) for path in row.implementations],
)
def test_class_has_the_protocols_members(protocol: str, implementation: str) -> None:
    """A class that is said to implement a Protocol has all of its members, and its methods take the same parameters."""
    assert mismatches(resolve(protocol), resolve(implementation)) == []


def test_mismatches_are_found() -> None:
    """The comparison sees a missing member, a missing, renamed or surplus parameter, and a wrong kind of method."""

    class Right:
        def data_ptr(self) -> int:
            return 0

        shape = dtype = device = ()

    class Wrong:
        def __init__(self) -> None:
            self.shape = ()

        async def data_ptr(self, extra: int) -> int:
            return extra

    assert mismatches(TensorLike, Right) == []
    assert mismatches(TensorLike, Wrong) == [
        "data_ptr: one is a coroutine function, the other is not",
        "data_ptr: the parameter 'extra' is not part of the Protocol and has no default",
        "device is missing",
        "dtype is missing",
    ]


def test_torch_tensor_is_tensor_like() -> None:
    """A torch.Tensor has what TensorLike promises, of the types it promises."""
    tensor: TensorLike = torch.zeros(2, 3)
    assert protocol_members(TensorLike) == {"shape", "dtype", "device", "data_ptr"}
    assert isinstance(tensor.shape, Sequence)
    assert list(tensor.shape) == [2, 3]
    assert tensor.dtype == torch.float32
    assert str(tensor.device) == "cpu"
    assert isinstance(tensor.data_ptr(), int)
