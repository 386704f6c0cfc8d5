"""The little that the CUDA executor needs of a device: a stream, pinned memory, copies, events, graphs. It is a Protocol, so
that tests can put a device in its place that no machine has to have."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import FerrumError


class DeviceMemory(NamedTuple):
    """Bytes. ``total`` and ``free`` are the device's, whoever uses it; ``reserved`` is what torch holds in this process;
    ``used`` what is allocated of that now, ``peak`` the most that was since ``forget_peak``."""

    total: int
    free: int
    reserved: int
    used: int
    peak: int


class DeviceEvent(Protocol):
    """A place in the stream."""

    def wait(self) -> None:
        """Until all that was enqueued before it is done. Holds no GIL, and raises what went wrong on the device."""
        ...


class DeviceGraph(Protocol):
    """What a function enqueued, to be enqueued again in one call, in the same places of memory."""

    def replay(self) -> None: ...


class StreamDevice(Protocol):
    """One stream of one device. All that is enqueued runs in that order, later."""

    @property
    def name(self) -> str:
        """As torch takes it: ``cuda:0``."""
        ...

    def stream(self) -> AbstractContextManager[object]:
        """What is enqueued inside, in this thread, goes to the stream."""
        ...

    def pinned(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host that ``copy`` can read and write while the host does something else."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue target = source, one of them pinned: it must be left alone until an event recorded later is done."""
        ...

    def record(self) -> DeviceEvent: ...

    def capture(self, function: Callable[[], None]) -> "list[DeviceGraph]":
        """What ``function`` enqueues is recorded instead of run: in one graph, and one more for each ``cut`` that it makes.
        Call the function once before, for whatever it sets up. All graphs of a device work in the same memory, so what those
        of one capture leave there is gone when those of another are replayed."""
        ...

    def cut(self) -> None:
        """While a function is captured: what it enqueues from here on belongs to the next graph."""
        ...

    def memory(self) -> DeviceMemory: ...

    def forget_peak(self) -> None:
        """Begin anew with ``DeviceMemory.peak``."""
        ...

    def empty_cache(self) -> None:
        """Give back memory that is reserved and not used."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the device goes on after ``error``, and may succeed with more memory."""
        ...

    def is_fatal(self, error: BaseException) -> bool:
        """Whether nothing will ever run on this device again in this process."""
        ...


class CudaDevice:
    """The current CUDA device, on a stream of its own. Make it, and use it, in one thread; events are waited for in any."""

    def __init__(self) -> None:
        self._captured: list[torch.cuda.CUDAGraph] = []
        self.name = f"cuda:{torch.cuda.current_device()}"
        self._stream = torch.cuda.Stream(self.name)
        self._pool = torch.cuda.graph_pool_handle()

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def pinned(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(num_elements, dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self) -> "CudaEvent":
        # A thread that waits for an event of the ordinary kind spins, which would take a core from the host.
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return CudaEvent(event)

    def capture(self, function: Callable[[], None]) -> list[DeviceGraph]:
        self._captured = []
        self._stream.synchronize()
        with self.stream():
            self._begin_graph()
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # what it has to say of a broken capture is less than what broke it
                    self._captured[-1].capture_end()
                raise
            self._captured[-1].capture_end()
        captured, self._captured = self._captured, []
        return list(captured)

    def cut(self) -> None:
        self._captured[-1].capture_end()
        self._begin_graph()

    def _begin_graph(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._captured.append(graph)
        # A first capture sets up the default generator, which the host may want outside of inference mode later. In the
        # default mode anything that another thread of the host does with CUDA meanwhile breaks the capture.
        with torch.inference_mode(False):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.name)
        return DeviceMemory(
            total=total,
            free=free,
            reserved=torch.cuda.memory_reserved(self.name),
            used=torch.cuda.memory_allocated(self.name),
            peak=torch.cuda.max_memory_allocated(self.name),
        )

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.name)

    def empty_cache(self) -> None:
        self._stream.synchronize()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError) or _says(error, _OUT_OF_MEMORY)

    def is_fatal(self, error: BaseException) -> bool:
        return not self.is_out_of_memory(error) and (isinstance(error, _CUDA_ERRORS) or _says(error, _FATAL))


class CudaEvent:
    """A torch.cuda.Event that was recorded."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


# torch raises AcceleratorError since 2.8 for what the driver reports, before that a RuntimeError; and so do libraries, with
# the driver's own words in them.
_CUDA_ERRORS: tuple[type[BaseException], ...] = tuple(
    kind for kind in (getattr(torch, "AcceleratorError", None),) if isinstance(kind, type)
)
_OUT_OF_MEMORY = ("out of memory", "cudaerrormemoryallocation", "cublas_status_alloc_failed")
_FATAL = ("cuda error", "cuda driver error", "cublas_status", "cudnn_status", "illegal memory access", "device-side assert")


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return not isinstance(error, FerrumError) and any(sign in text for sign in signs)
