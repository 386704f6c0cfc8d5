"""TensorOps for the CPU, by native kernels. Each call is a few instructions, which are run at once, or written down to be
run for every batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferrum_rt.kernels.cpu.build import Kernels
from ferrum_rt.kernels.cpu.program import (
    KINDS,
    PER_GRANULE,
    TYPES,
    BatchSizes,
    Kind,
    Op,
    Program,
    Rows,
    instruction,
)
from ferrum_rt.kernels.reference import ReferenceOps

_PANEL = 32
_LINE = 64  # bytes of a cache line
_GRANULE = 4  # bytes


class PackedLinear(NamedTuple):
    """A weight [out, in] as panels, see native/linear.h. ``bias`` [panels * 32] is in float32; int8 weights have ``scales``
    and ``offsets`` [panels * 32]."""

    kind: Kind
    panels: Tensor
    granules: int
    out_features: int
    bias: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None


class _Recording(NamedTuple):
    """``rows`` is what a batch's number of rows is called, which is ``full`` at most."""

    rows: Rows
    full: int
    instructions: list[bytes]


class NativeOps(ReferenceOps):
    """``num_threads`` of a pool of its own, which ``close`` ends; the thread that calls is one of them."""

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        super().__init__("cpu")
        self._kernels = kernels
        self._pool: int | None = kernels.open_pool(num_threads)
        self._recording: _Recording | None = None
        self._scratch: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def close(self) -> None:
        if self._pool is not None:
            self._kernels.close_pool(self._pool)
            self._pool = None

    def record(self, rows: Rows, full: int, calls: Callable[[], None]) -> list[bytes]:
        """The instructions of ``calls``, none of which is run: they are given tensors of ``full`` rows, and the instructions
        work on as many as a batch has. All the tensors must stay where they are."""
        self._recording = _Recording(rows, full, [])
        try:
            calls()
            return self._recording.instructions
        finally:
            self._recording = None

    def run(self, program: Program, sizes: BatchSizes) -> None:
        """One native call, without the GIL."""
        self._kernels.run(self._pool, program.address, program.length, *sizes)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A matrix has rows an odd number of cache lines apart: a power of two would make them fall on each other in the
        cache."""
        if len(shape) != 2:
            return super().empty(shape, dtype)
        rows, width = shape
        stride = _odd_lines(width * dtype.itemsize) // dtype.itemsize
        return super().empty((rows, stride), dtype)[:, :width]

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, is_int8: bool = False) -> PackedLinear:
        return self.pack(weight, bias, Kind.INT8 if is_int8 else KINDS[weight.dtype])

    def pack(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> PackedLinear:
        """As ``pack_linear``, in granules of ``kind``: the weight's own, or INT8."""
        rows, width = weight.shape
        weight = weight.contiguous()
        granules, panels = -(-width // PER_GRANULE[kind]), -(-rows // _PANEL)
        packed = torch.zeros((panels, granules, _PANEL), dtype=torch.int32)
        self._kernels.want_large_pages(packed.data_ptr(), packed.nbytes)
        is_int8 = kind is Kind.INT8
        scales = torch.zeros(panels * _PANEL) if is_int8 else None
        offsets = torch.zeros(panels * _PANEL, dtype=torch.int32) if is_int8 else None
        self._kernels.pack_weight(
            TYPES[weight.dtype], weight.data_ptr(), rows, width, kind, packed.data_ptr(), _address(scales), _address(offsets)
        )
        wide_bias = None
        if bias is not None:
            wide_bias = torch.zeros(panels * _PANEL)
            wide_bias[:rows] = bias
        return PackedLinear(kind, packed, granules, rows, wide_bias, scales, offsets)

    def linear(self, out: Tensor, x: Tensor, weight: Any) -> None:
        rows, width = x.shape
        is_int8 = weight.kind is Kind.INT8
        scales = self._scratch_rows((rows, 1), torch.float32) if is_int8 else None
        if is_int8 or width % PER_GRANULE[weight.kind] or x.stride(0) * x.itemsize % _GRANULE or x.data_ptr() % _GRANULE:
            # One granule more, for what is no whole one.
            granules = self._scratch_rows((rows, _odd_lines((weight.granules + 1) * _GRANULE) // _GRANULE), torch.int32)
            address, stride = granules.data_ptr(), granules.stride(0)
            self._emit(
                Op.PREPARE, x.dtype, rows, x.data_ptr(), x.stride(0), width, address, stride, _address(scales), weight.kind
            )
        else:
            address, stride = x.data_ptr(), x.stride(0) * x.itemsize // _GRANULE
        self._emit(
            Op.LINEAR, out.dtype, rows, out.data_ptr(), out.stride(0), weight.out_features, address, stride,
            weight.panels.data_ptr(), weight.granules, _address(weight.bias), _address(scales), _address(weight.scales),
            _address(weight.offsets), weight.kind,
        )  # fmt: skip

    def _emit(self, op: Op, dtype: torch.dtype, rows: int | Rows, *words: int | float) -> None:
        """An instruction, run or recorded. ``rows`` is the number of rows that the call was given."""
        recording = self._recording
        if recording is None:
            self.run(Program([instruction(op, dtype, rows, *words)]), BatchSizes(0, 0, 0))
            return
        if not isinstance(rows, Rows):
            assert rows == recording.full, "what is recorded is the whole batch's"
            rows = recording.rows
        recording.instructions.append(instruction(op, dtype, rows, *words))

    def _scratch_rows(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory that one instruction fills for the next. Nobody uses it in between, so all recorded calls have the same."""
        if self._recording is None:
            return torch.empty(shape, dtype=dtype)
        key = (*shape, dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=dtype)
        return self._scratch[key]

    def _out_features(self, weight: Any) -> int:
        return int(weight.out_features)


def _odd_lines(size: int) -> int:
    """At least ``size`` bytes, as an odd number of cache lines."""
    return (-(-size // _LINE) | 1) * _LINE


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
