"""TensorOps for the CPU, by native kernels. Each call is a few instructions, which are run at once, or written down to be
run for every batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class Granules(NamedTuple):
    """Rows of x [rows, granules] as they are multiplied, and for int8 their ``scales`` [rows]."""

    values: Tensor
    scales: Tensor | None


class _Recording(NamedTuple):
    """``rows`` is what a batch's number of rows is called, which is ``full`` at most."""

    rows: Rows
    full: int
    instructions: list[bytes]


class Rounds(NamedTuple):
    """What rounds of decodes have found, ``ids`` and ``values`` [rounds, rows], and how many there were: ``round`` [1]."""

    ids: Tensor
    values: Tensor
    round: Tensor


class Draws(NamedTuple):
    """How tokens are drawn, by row: ``keys`` int64 [R, 2], the seed and the number of the sample; ``cuts`` float64 [R, 4],
    temperature (0 for none), top_k, top_p and min_p."""

    keys: Tensor
    cuts: Tensor


class NativeOps(ReferenceOps):
    """``num_threads`` of a pool of its own, which ``close`` ends; the thread that calls is one of them."""

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        super().__init__("cpu")
        self._kernels = kernels
        self._pool: int | None = kernels.open_pool(num_threads)
        self._recording: _Recording | None = None
        self._scratch: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self._tables: list[Tensor] = []  # that recorded instructions point to

    def close(self) -> None:
        if self._pool is not None:
            self._kernels.close_pool(self._pool)
            self._pool = None

    @contextmanager
    def record(self, rows: Rows, full: int) -> Iterator[list[bytes]]:
        """The instructions of the calls made meanwhile, none of which is run: the calls are given tensors of ``full`` rows,
        and the instructions work on as many as a batch has. All the tensors must stay where they are."""
        self._recording = _Recording(rows, full, [])
        try:
            yield self._recording.instructions
        finally:
            self._recording = None

    def run(self, program: Program, sizes: BatchSizes, length: int | None = None) -> None:
        """One native call, without the GIL, of the first ``length`` instructions."""
        self._kernels.run(self._pool, program.address, program.length if length is None else length, *sizes)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A matrix has rows an odd number of cache lines apart: a power of two would make them fall on each other in the
        cache."""
        if len(shape) != 2:
            return super().empty(shape, dtype)
        rows, width = shape
        return super().empty((rows, _stride(width, dtype)), dtype)[:, :width]

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
        granules = self._granules(x, weight)
        self._emit(Op.LINEAR, out.dtype, len(x), *_linear_words(out, granules, weight))

    def _granules(self, x: Tensor, weight: PackedLinear) -> Granules:
        """x as ``weight`` wants it: where it lies if it can be read there, otherwise in scratch."""
        rows, width = x.shape
        is_int8 = weight.kind is Kind.INT8
        scales = self._scratch_rows((rows,), torch.float32, "scales") if is_int8 else None
        if not (
            is_int8 or width % PER_GRANULE[weight.kind] or x.stride(0) * x.itemsize % _GRANULE or x.data_ptr() % _GRANULE
        ):
            return Granules(x.view(torch.int32), None)
        # One granule more, for what is no whole one.
        granules = self._scratch_matrix(rows, weight.granules + 1, torch.int32, "granules")
        self._emit(
            Op.PREPARE, x.dtype, rows, x.data_ptr(), x.stride(0), width, granules.data_ptr(), granules.stride(0),
            _address(scales), weight.kind,
        )  # fmt: skip
        return Granules(granules, scales)

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

    def draw(self, ids: Tensor, highest: Tensor, logits: Tensor, positions: Tensor, rows: Tensor, draws: Draws) -> None:
        """For each row with a temperature put into ids [R] what is drawn of it. Before that ``ids`` and ``highest`` are what
        ``argmax`` has found of logits [R, V]. Each belongs to that of ``rows`` [R] of the batch, whose place ``positions``
        says: the token will stand behind it."""
        self._emit(
            Op.DRAW, logits.dtype, len(logits), ids.data_ptr(), highest.data_ptr(), logits.data_ptr(), logits.stride(0),
            logits.shape[1], positions.data_ptr(), rows.data_ptr(), draws.keys.data_ptr(), draws.cuts.data_ptr(),
        )  # fmt: skip

    def advance(self, batch: TokenBatch, plan: AttentionPlan, found: Rounds, values: Tensor, ids: Tensor) -> None:
        """A round of decodes is over, for which ``argmax`` has written ``values`` and ``ids``: put them aside, and make the
        batch that of the next round."""
        self._emit(
            Op.ADVANCE, torch.float32, len(ids), batch.token_ids.data_ptr(), batch.positions.data_ptr(),
            batch.kv_slots.data_ptr(), plan.spans.data_ptr(), batch.block_tables.data_ptr(), batch.block_tables.stride(0),
            batch.block_size, ids.data_ptr(), values.data_ptr(), found.ids.data_ptr(), found.values.data_ptr(),
            found.ids.stride(0), found.round.data_ptr(),
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

    def mixture_of_experts(
        self,
        out: Tensor,
        x: Tensor,
        router_logits: Tensor,
        experts: Sequence[tuple[Any, Any]],
        *,
        top_k: int,
        renormalize: bool,
        kind: str,
    ) -> None:
        (rows, num_experts), scratch = router_logits.shape, self._scratch_rows
        chosen, tokens, places = (scratch((rows * top_k,), torch.int64, name) for name in ("chosen", "tokens", "places"))
        weights = scratch((rows * top_k,), torch.float32, "weights")
        starts = scratch((num_experts + 1,), torch.int64, "starts")
        self._emit(
            Op.ROUTE, router_logits.dtype, rows, chosen.data_ptr(), weights.data_ptr(), router_logits.data_ptr(),
            router_logits.stride(0), num_experts, top_k, renormalize,
        )  # fmt: skip
        self._emit(
            Op.GROUP, x.dtype, rows, starts.data_ptr(), tokens.data_ptr(), places.data_ptr(), chosen.data_ptr(), num_experts,
            top_k,
        )  # fmt: skip
        gate_ups, downs = [pair[0] for pair in experts], [pair[1] for pair in experts]
        gathered = self._gathered(self._granules(x, gate_ups[0]), tokens)
        gate_up = self._experts_linear(gathered, gate_ups, starts, x.dtype, "gate_up")
        activated = self._scratch_matrix(len(tokens), gate_up.shape[1] // 2, x.dtype, "activated")
        self.gated_activation(activated, gate_up, kind)
        results = self._experts_linear(self._granules(activated, downs[0]), downs, starts, x.dtype, "results")
        self._emit(
            Op.COMBINE, out.dtype, rows, out.data_ptr(), out.stride(0), out.shape[1], results.data_ptr(), results.stride(0),
            places.data_ptr(), weights.data_ptr(), top_k,
        )  # fmt: skip

    def _gathered(self, x: Granules, rows: Tensor) -> Granules:
        """These rows of x, one after the other."""
        values = self._scratch_matrix(len(rows), x.values.shape[1], torch.int32, "gathered")
        self.gather_rows(values.view(torch.float32), x.values.view(torch.float32), rows)
        if x.scales is None:
            return Granules(values, None)
        scales = self._scratch_rows((len(rows),), torch.float32, "gathered scales")
        self.gather_rows(scales[:, None], x.scales[:, None], rows)
        return Granules(values, scales)

    def _experts_linear(
        self, x: Granules, weights: Sequence[PackedLinear], starts: Tensor, dtype: torch.dtype, name: str
    ) -> Tensor:
        """Rows ``starts[i]`` to ``starts[i + 1]`` of x by ``weights[i]``, which are alike."""
        out = self._scratch_matrix(len(x.values), weights[0].out_features, dtype, name)
        addresses = [
            [weight.panels.data_ptr(), _address(weight.bias), _address(weight.scales), _address(weight.offsets)]
            for weight in weights
        ]
        table = torch.tensor(addresses)
        if self._recording is not None:
            self._tables.append(table)
        self._emit(
            Op.EXPERTS_LINEAR, dtype, len(out), *_linear_words(out, x, weights[0]), len(weights), table.data_ptr(),
            starts.data_ptr(),
        )  # fmt: skip
        return out

    def _emit(self, op: Op, dtype: torch.dtype, rows: int | Rows, *words: int | float) -> None:
        """An instruction, run or recorded. ``rows`` is the number of rows that the call was given."""
        recording = self._recording
        if recording is None:
            self.run(Program([instruction(op, dtype, rows, *words)]), BatchSizes(0, 0, 0))
            return
        if not isinstance(rows, Rows):
            times, rest = divmod(rows, recording.full)
            assert rest == 0, "what is recorded is the whole batch's"
            rows = recording.rows.times(times)
        recording.instructions.append(instruction(op, dtype, rows, *words))

    def _scratch_rows(self, shape: tuple[int, ...], dtype: torch.dtype, name: str = "") -> Tensor:
        """Memory that one instruction fills for another of the same call, so all recorded calls have the same; what a call
        needs at a time must differ in name, shape or dtype."""
        if self._recording is None:
            return torch.empty(shape, dtype=dtype)
        key = (name, shape, dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(shape, dtype=dtype)
        return self._scratch[key]

    def _scratch_matrix(self, rows: int, width: int, dtype: torch.dtype, name: str) -> Tensor:
        return self._scratch_rows((rows, _stride(width, dtype)), dtype, name)[:, :width]

    def _out_features(self, weight: Any) -> int:
        return int(weight.out_features)


def _stride(width: int, dtype: torch.dtype) -> int:
    """At least ``width``, and an odd number of cache lines."""
    return (-(-width * dtype.itemsize // _LINE) | 1) * _LINE // dtype.itemsize


def _linear_words(out: Tensor, x: Granules, weight: PackedLinear) -> tuple[int, ...]:
    return (
        out.data_ptr(), out.stride(0), weight.out_features, x.values.data_ptr(), x.values.stride(0),
        weight.panels.data_ptr(), weight.granules, _address(weight.bias), _address(x.scales), _address(weight.scales),
        _address(weight.offsets), weight.kind,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
