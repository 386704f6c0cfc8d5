"""TensorOps for the CPU, by native kernels. Each call is a few instructions, which are run at once, or written down to be
run for every batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.kernels.batch import TokenBatch
from ferrum_rt.kernels.cpu.attention import AttentionPlan, append_words, attention_words, make_plan, plan_words
from ferrum_rt.kernels.cpu.build import Kernels
from ferrum_rt.kernels.cpu.program import (
    ACTIVATIONS,
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

    def embed(self, out: Tensor, token_ids: Tensor, table: Tensor, scale: float) -> None:
        self._emit(
            Op.GATHER, out.dtype, len(out), out.data_ptr(), out.stride(0), out.shape[1], table.data_ptr(), table.stride(0),
            token_ids.data_ptr(), float(scale),
        )  # fmt: skip

    def gather_rows(self, out: Tensor, x: Tensor, rows: Tensor) -> None:
        self.embed(out, rows, x, 1.0)

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        self._norm(out, None, x, weight, eps)

    def add_rms_norm(self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        self._norm(out, residual, x, weight, eps)

    def _norm(self, out: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> None:
        self._emit(
            Op.RMS_NORM, out.dtype, len(out), out.data_ptr(), out.stride(0), out.shape[1], x.data_ptr(), x.stride(0),
            _address(residual), 0 if residual is None else residual.stride(0), weight.data_ptr(), eps,
        )  # fmt: skip

    def qk_norm_rope(self, qk: Tensor, norm_weight: Tensor | None, eps: float, positions: Tensor, cos_sin: Tensor) -> None:
        rows, heads, dim = qk.shape
        self._emit(
            Op.QK_NORM_ROPE, qk.dtype, rows, qk.data_ptr(), qk.stride(0), qk.stride(1), heads, dim, _address(norm_weight),
            0 if norm_weight is None else norm_weight.stride(0), eps, positions.data_ptr(), cos_sin.data_ptr(),
            cos_sin.stride(0), cos_sin.shape[1] // 2,
        )  # fmt: skip

    def gated_activation(self, out: Tensor, gate_up: Tensor, kind: str) -> None:
        self._emit(
            Op.GATED_ACTIVATION, out.dtype, len(out), out.data_ptr(), out.stride(0), out.shape[1], gate_up.data_ptr(),
            gate_up.stride(0), ACTIVATIONS[kind],
        )  # fmt: skip

    def soft_cap(self, x: Tensor, cap: float) -> None:
        self._emit(Op.SOFT_CAP, x.dtype, len(x), x.data_ptr(), x.stride(0), x.shape[1], float(cap))

    def argmax(self, values: Tensor, ids: Tensor, logits: Tensor) -> None:
        """values [R] (float32) and ids [R] (int64) of the first largest entry of each row of logits [R, V]; NaN counts as
        largest."""
        self._emit(
            Op.ARGMAX, logits.dtype, len(logits), values.data_ptr(), ids.data_ptr(), logits.data_ptr(), logits.stride(0),
            logits.shape[1],
        )  # fmt: skip

    def plan_attention(self, batch: TokenBatch, kinds: Sequence[AttentionKind]) -> AttentionPlan:
        """Recorded, it is of batches with at most this one's spans and tokens: before each step whoever runs it overwrites
        ``spans`` of the plan, which is read anew."""
        plan = make_plan(batch, kinds)
        self._emit(Op.PLAN, torch.float32, len(plan.spans) if self._recording is None else Rows.SPANS, *plan_words(plan))
        return plan

    def append_kv(self, layer: KvLayer[Tensor], kv: Tensor, kv_slots: Tensor) -> None:
        self._emit(Op.APPEND, kv.dtype, len(kv), *append_words(layer, kv, kv_slots))

    def attention(self, out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Any, kind: AttentionKind) -> None:
        self._emit(Op.ATTENTION, q.dtype, len(q), *attention_words(out, q, layer, plan, kind))

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
