"""TensorOps for the CPU: linear layers by native kernels, the rest in torch.

Not what the engine runs on yet. Between two calls torch's own threads spin for work, on the cores that the pool wants: in a
whole step that costs more than the kernels gain. They are to be used when a step is one native program.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferrum_rt.kernels.cpu.build import Kernels
from ferrum_rt.kernels.cpu.program import KINDS, PER_GRANULE, TYPES, Kind, Op, instruction
from ferrum_rt.kernels.reference import ReferenceOps

_PANEL = 32
_LINE = 16  # granules of a cache line


class PackedLinear(NamedTuple):
    """A weight [out, in] as panels, see native/linear.h. ``bias`` [panels * 32] is in float32; int8 weights have ``scales``
    and
    ``offsets`` [panels * 32]."""

    kind: Kind
    panels: Tensor
    granules: int
    out_features: int
    bias: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None


class NativeOps(ReferenceOps):
    """``num_threads`` of a pool of its own, which ``close`` ends; the thread that calls is one of them."""

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        super().__init__("cpu")
        self._kernels = kernels
        self._pool: int | None = kernels.open_pool(num_threads)

    def close(self) -> None:
        if self._pool is not None:
            self._kernels.close_pool(self._pool)
            self._pool = None

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return self.pack(weight, bias, KINDS[weight.dtype])

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
        # An odd number of cache lines: rows a power of two apart would fall on each other in the cache.
        stride = (-(-(weight.granules + 1) // _LINE) | 1) * _LINE
        prepared = torch.empty((rows, stride), dtype=torch.int32)
        scales = torch.empty(rows) if weight.kind is Kind.INT8 else None
        self._run(
            instruction(
                Op.PREPARE, x.dtype, rows, x.data_ptr(), x.stride(0), width, prepared.data_ptr(), stride, _address(scales),
                weight.kind,
            ),
            instruction(
                Op.LINEAR, out.dtype, rows, out.data_ptr(), out.stride(0), weight.out_features, prepared.data_ptr(), stride,
                weight.panels.data_ptr(), weight.granules, _address(weight.bias), _address(scales), _address(weight.scales),
                _address(weight.offsets), weight.kind,
            ),
        )  # fmt: skip

    def _run(self, *program: bytes) -> None:
        words = ctypes.create_string_buffer(b"".join(program))
        self._kernels.run(self._pool, ctypes.addressof(words), len(program), 0, 0)

    def _out_features(self, weight: Any) -> int:
        return int(weight.out_features)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
