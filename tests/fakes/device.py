"""A device without a device: what is enqueued on it runs later, on the CPU, in a thread that stands for the device.

Every torch operation inside of ``stream()`` is taken down instead of run, and what it would return holds poison (NaN, or a
number that is no index) until it has run. So whoever reads a result before its event reads poison, and whoever writes over
the input of what has not run yet spoils it: pinned memory is read when the copy runs. Only views are made at once.

What makes a real device wait (``tolist``, ``item``, ``nonzero``, …) runs everything first, and counts in ``num_syncs``.
While a graph is captured it is an error. A replay runs what was taken down, in the same memory.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from ferrum_rt.kernels.cuda.device import DeviceGraph, DeviceMemory

POISON = -(2**60)
_READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_NEVER_RUN_LATER = ("aten::empty", "aten::new_empty", "aten::_pin_memory", "aten::is_pinned")

Operation = Callable[[], object]


class FatalError(RuntimeError):
    """As a kernel that reads where nothing is: from here on every call fails."""


@dataclass(eq=False)
class EmulatedEvent:
    """A place in the queue."""

    device: "EmulatedDevice"
    is_reached: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def wait(self) -> None:
        self.device.wait_for(self)


class EmulatedGraph:
    """Operations that were captured."""

    def __init__(self, device: "EmulatedDevice", operations: list[Operation]) -> None:
        self._device, self.operations = device, operations
        self.num_replays = 0

    def replay(self) -> None:
        self._device.check_alive()
        self.num_replays += 1
        for operation in self.operations:
            self._device.enqueue(operation)


class EmulatedDevice:
    """A StreamDevice. ``is_lazy`` runs nothing but what the thread that enqueues waits for itself, and what is there at
    ``advance``; else an event that anybody waits for makes everything before it run.

    ``fail_at`` counts down with each operation that needs memory for its result: at 0 that raises OutOfMemoryError, and so
    do the next, ``num_failures`` in all.
    ``die_at`` counts operations as they run: at 0 the device is dead. ``capacity`` is what ``memory`` reports as its total.
    """

    name = "cpu"

    def __init__(self, *, is_lazy: bool = False, capacity: int = 2**30) -> None:
        self.num_syncs = self.num_run = self.num_empty_cache = 0
        self.fail_at: int | None = None
        self.die_at: int | None = None
        self.num_failures = 1
        self.graphs: list[EmulatedGraph] = []
        self.last_event = EmulatedEvent(self)
        self._is_lazy, self._capacity = is_lazy, capacity
        self._queue: deque[Operation | EmulatedEvent] = deque()
        self._pinned: list[Tensor] = []
        self._captured: list[Operation] | None = None
        self._death: FatalError | None = None
        self._owner: int | None = None
        self._is_inside = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emulated-device")

    # -- what the executor calls --------------------------------------------------------------------------------------

    @contextmanager
    def stream(self) -> Iterator[None]:
        if self._is_inside:
            yield
            return
        self._owner, self._is_inside = threading.get_ident(), True
        try:
            with _Reads(self), _TakesDown(self):
                yield
        finally:
            self._is_inside = False

    def pinned(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        self._pinned.append(torch.zeros(num_elements, dtype=dtype))
        return self._pinned[-1]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Until it has run a target on the host holds poison."""
        is_pinned = [any(_overlap(x, known) for known in self._pinned) for x in (target, source)]
        assert any(is_pinned), "neither side of this copy is pinned: it would wait"
        if is_pinned[0]:
            with torch._C._DisableTorchDispatch():
                poison(target)
        self.enqueue(partial(target.copy_, source))

    def record(self) -> EmulatedEvent:
        self.check_alive()
        assert self._captured is None, "an event cannot be recorded in a graph"
        self.last_event = event = EmulatedEvent(self)
        self._queue.append(event)
        return event

    def capture(self, function: Callable[[], None]) -> list[DeviceGraph]:
        assert self._captured is None, "a graph is being captured already"
        self.synchronize()
        first = len(self.graphs)
        self._captured = []
        try:
            function()
            self.cut()
        finally:
            self._captured = None
        return list(self.graphs[first:])

    def cut(self) -> None:
        assert self._captured, "a graph with nothing in it"
        self.graphs.append(EmulatedGraph(self, self._captured))
        self._captured = []

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self._capacity, self._capacity - 2**20, 2**19, 2**18, 2**19)

    def forget_peak(self) -> None:
        pass

    def empty_cache(self) -> None:
        self.synchronize()
        self.num_empty_cache += 1

    def synchronize(self) -> None:
        event = self.record()
        self._run(event)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def is_fatal(self, error: BaseException) -> bool:
        return isinstance(error, FatalError)

    # -- what tests call ----------------------------------------------------------------------------------------------

    @property
    def is_capturing(self) -> bool:
        return self._captured is not None

    @property
    def num_queued(self) -> int:
        return sum(not isinstance(item, EmulatedEvent) for item in self._queue)

    def advance(self, to: EmulatedEvent | None = None) -> None:
        """Run what is queued before ``to``, or all."""
        if to is None:
            to = EmulatedEvent(self)
            self._queue.append(to)
        self._run(to, must_work=False)

    def close(self) -> None:
        self._thread.shutdown()

    # -- the queue ----------------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def enqueue(self, operation: Operation) -> None:
        self.check_alive()
        (self._queue if self._captured is None else self._captured).append(operation)

    def allocate(self) -> None:
        """Whoever is about to enqueue needs memory for its result."""
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.num_failures -= 1
                self.fail_at = None if self.num_failures <= 0 else 0
                raise torch.OutOfMemoryError("CUDA out of memory, as the test wanted it")

    def wait_for(self, event: EmulatedEvent) -> None:
        if event.is_reached.is_set() and event.error is None:
            return
        if self._is_lazy and threading.get_ident() != self._owner:
            assert event.is_reached.wait(timeout=30), "nobody advanced the device"
            if event.error is not None:
                raise event.error
        else:
            self._run(event)

    def sync(self) -> None:
        """What a read of a result does to a device."""
        assert not self.is_capturing, "a graph cannot wait for the device"
        self.num_syncs += 1
        self.synchronize()

    def _run(self, event: EmulatedEvent, *, must_work: bool = True) -> None:
        self._thread.submit(self._run_until, event).result()
        if must_work and event.error is not None:
            raise event.error

    @torch.inference_mode()
    def _run_until(self, event: EmulatedEvent) -> None:
        """In the device's thread."""
        while not event.is_reached.is_set():
            item = self._queue.popleft()
            if isinstance(item, EmulatedEvent):
                item.error = self._death
                item.is_reached.set()
            elif self._death is None:
                self._run_one(item)

    def _run_one(self, operation: Operation) -> None:
        if self.die_at is not None:
            self.die_at -= 1
            if self.die_at < 0:
                self._death = FatalError("CUDA error: an illegal memory access was encountered")
                return
        self.num_run += 1
        try:
            operation()
        except Exception as error:  # poison as an index, say; a kernel that fails takes the device with it
            self._death = FatalError(f"CUDA error: {error!r}")


class _Reads(TorchFunctionMode):
    """Reads that go past the dispatcher."""

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _READERS:
            self._device.sync()
        if function is torch.asarray:  # the host's own memory, of a file say, seen as a tensor
            with torch._C._DisableTorchDispatch():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class _TakesDown(TorchDispatchMode):
    """Turns operations into entries of the queue."""

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        nature = _nature_of(function)
        if nature == "composite":
            with self:
                return function.decompose(*args, **kwargs)
        if nature == "view":
            return function(*args, **kwargs)
        if nature == "empty":
            return tree_map_only(Tensor, poison, function(*args, **kwargs))
        self._device.check_alive()
        written = _written(function, args, kwargs)
        if written is not None:
            self._device.enqueue(partial(_call, function, args, kwargs))
            return written
        self._device.allocate()
        results = None if nature == "read" else _like(function, args, kwargs)
        if results is None:
            self._device.sync()
            return function(*args, **kwargs)
        self._device.enqueue(partial(_call_into, results, function, args, kwargs))
        return results


def poison(x: Tensor) -> Tensor:
    """Fill with what nobody can mistake for a result."""
    if x.numel() == 0:
        return x
    if x.dtype.is_floating_point:
        return x.view(torch.uint8).fill_(0x7F).view(x.dtype) if x.itemsize == 1 else x.fill_(math.nan)
    return x.fill_(POISON) if x.dtype == torch.int64 else x.fill_(True if x.dtype == torch.bool else 77)


def _overlap(x: Tensor, whole: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _call(function: Any, args: Any, kwargs: Any) -> None:
    function(*args, **kwargs)


def _call_into(results: Any, function: Any, args: Any, kwargs: Any) -> None:
    for target, value in zip(tree_flatten(results)[0], tree_flatten(function(*args, **kwargs))[0], strict=True):
        target.copy_(value)


@cache
def _nature_of(function: Any) -> str:
    schema = function._schema
    if schema.name in _NEVER_RUN_LATER or schema.name.startswith("aten::empty"):
        return "empty"
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
        return "composite"
    if any(item.alias_info is not None and not item.alias_info.is_write for item in schema.returns):
        return "view"
    if not schema.returns or any("Tensor" not in str(item.type) for item in schema.returns):
        return "void" if not schema.returns else "read"
    return "new"


def _written(function: Any, args: Any, kwargs: Any) -> Any:
    """The arguments that an operation in place, or one with ``out``, returns; None for another."""
    schema = function._schema
    found = [
        args[place] if place < len(args) else kwargs[item.name]
        for place, item in enumerate(schema.arguments)
        if item.alias_info is not None and item.alias_info.is_write and (place < len(args) or item.name in kwargs)
    ]
    if not found:
        return None
    return found[0] if len(found) == 1 else tuple(found)


_shapes: dict[Any, Any] = {}


def _like(function: Any, args: Any, kwargs: Any) -> Any:
    """Poisoned tensors of the shapes that the result will have; None if that depends on what is in the arguments."""
    key = function, _signature(args), _signature(tuple(kwargs.items()))
    if key not in _shapes:
        _shapes[key] = _infer(function, args, kwargs)
    shapes = _shapes[key]
    if shapes is None:
        return None
    made = [poison(torch.empty_strided(size, stride, dtype=dtype)) for size, stride, dtype in shapes]
    return made[0] if len(made) == 1 and len(function._schema.returns) == 1 else tuple(made)


def _signature(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_signature, x)) if isinstance(x, (list, tuple)) else (type(x), x)


def _infer(function: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any, torch.dtype]] | None:
    def to_meta(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, to_meta, (args, kwargs))
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("meta")}
    try:
        result = function(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # torch has no answer without the numbers
        return None
    return [(x.shape, x.stride(), x.dtype) for x in tree_flatten(result)[0]]
