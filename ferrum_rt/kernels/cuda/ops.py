"""TensorOps for NVIDIA GPUs: FlashInfer where it has a kernel, torch for the rest. No op waits for the device once it has
been called with its weights before, so all of them can be captured in a CUDA graph."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.interfaces.errors import DeviceError, Unsupported
from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.kernels.attention import FP8_MAX
from ferrum_rt.kernels.batch import TokenBatch
from ferrum_rt.kernels.cuda.attention import (
    WORKSPACE_BYTES,
    AttentionCall,
    AttentionGaps,
    AttentionSetup,
    DecodeAttention,
    DecodeBuffers,
    EagerAttention,
    attend,
    decode_buffers,
)
from ferrum_rt.kernels.cuda.experts import StackedExperts, combine, grouped_linear, route, stack_experts
from ferrum_rt.kernels.cuda.norms import HeadRun, NarrowWeight, head_runs, narrow
from ferrum_rt.kernels.reference import ReferenceOps

W = TypeVar("W")
_VECTOR = 8  # elements of 16 bits in the 16 bytes that FlashInfer's kernels load at once


class CudaOps(ReferenceOps):
    """FlashInfer on one device, for activations of ``dtype`` and pages of ``kv_dtype`` with ``block_size`` tokens each.

    ``flashinfer`` stands for the module in tests. Raises Unsupported for types that have no kernel, and DeviceError where
    FlashInfer is not installed.
    """

    def __init__(
        self,
        device: str = "cuda",
        *,
        block_size: int,
        kv_dtype: torch.dtype,
        dtype: torch.dtype,
        flashinfer: Any = None,
    ) -> None:
        super().__init__(device)
        _check_dtypes(dtype, kv_dtype)
        self.block_size = block_size
        self._flashinfer = import_flashinfer() if flashinfer is None else flashinfer
        # Zeroed because FlashInfer asks for it.
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._setup = AttentionSetup(self._flashinfer, dtype, kv_dtype, block_size, workspace)
        self._eager = EagerAttention(self._setup)
        self._decode_buffers: DecodeBuffers | None = None
        # What was made of a weight at its first use, by the weight's id; the weight is kept so that the id stays its own.
        self._prepared: dict[int, tuple[Any, Any]] = {}

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, is_int8: bool = False) -> Any:
        if is_int8:
            raise Unsupported("dtype int8: on CUDA the model runs in bfloat16 or float16; or use the device 'cpu'")
        return super().pack_linear(weight.to(self.device), None if bias is None else bias.to(self.device))

    def plan_attention(self, batch: TokenBatch, kinds: Sequence[AttentionKind]) -> Any:
        """For a step that runs eagerly; valid until the next. May wait until the step before has started."""
        return self._eager.plan(batch, kinds)

    def decode_attention(self, num_rows: int, max_pages: int, kinds: Sequence[AttentionKind]) -> DecodeAttention:
        """For a CUDA graph of ``num_rows`` decodes of up to ``max_pages`` pages each; make the largest first, whose buffers
        the others use too. Raises Unsupported."""
        held = self._decode_buffers
        if held is None or not held.has_room(num_rows, max_pages, len(kinds)):
            held = self._decode_buffers = decode_buffers(num_rows, max_pages, len(kinds), self.device)
        return DecodeAttention(self._setup, held, num_rows, kinds)

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        self._norm(out, x, self._narrow(weight), eps)

    def add_rms_norm(self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        if out.data_ptr() != x.data_ptr():
            residual.add_(x)
            self.rms_norm(out, residual, weight, eps)
            return
        norm = self._narrow(weight)
        fused = self._flashinfer.gemma_fused_add_rmsnorm if norm.is_offset else self._flashinfer.fused_add_rmsnorm
        fused(x, residual, norm.weight, eps)

    def qk_norm_rope(self, qk: Tensor, norm_weight: Tensor | None, eps: float, positions: Tensor, cos_sin: Tensor) -> None:
        _, num_heads, head_dim = qk.shape
        if cos_sin.shape[1] % (2 * _VECTOR):
            raise Unsupported(
                f"rotary dimensions {cos_sin.shape[1]}: CUDA turns a multiple of {2 * _VECTOR}; use the device 'cpu'"
            )
        if norm_weight is not None:
            self._norm_heads(qk, norm_weight, eps)
        # It makes no difference which heads are the queries' here.
        queries, keys = qk.split([num_heads - 1, 1], dim=1)
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, queries, keys, head_dim, cos_sin, is_neox=True)

    def append_kv(self, layer: KvLayer[Tensor], kv: Tensor, kv_slots: Tensor) -> None:
        """One kernel for keys and values where FlashInfer's append takes both apart and wants each token's sequence and
        position, which ``kv_slots`` says already; for fp8 three, where it would take one conversion too."""
        if layer.data.dtype == torch.float8_e4m3fn:
            # Not every version of torch stops at the largest value by itself; the others turn what lies beyond to NaN.
            kv = kv.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
            layer.data.view(torch.uint8).index_copy_(0, kv_slots, kv)
        else:
            layer.data.index_copy_(0, kv_slots, kv)

    def attention(self, out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Any, kind: AttentionKind) -> None:
        if isinstance(plan, AttentionGaps):
            plan.keep(AttentionCall(out, q, layer, kind))
        else:
            attend(out, q, layer, plan, kind, self.block_size)

    def gated_activation(self, out: Tensor, gate_up: Tensor, kind: str) -> None:
        if out.shape[1] % _VECTOR:
            raise Unsupported(f"intermediate_size {out.shape[1]}: CUDA takes a multiple of {_VECTOR}; use the device 'cpu'")
        activate = self._flashinfer.silu_and_mul if kind == "silu" else self._flashinfer.gelu_tanh_and_mul
        activate(gate_up, out)

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
        if x.dtype != torch.bfloat16:
            # In other types torch takes the grouped matmul apart, and waits for the device to tell how.
            raise Unsupported(f"dtype {x.dtype}: on CUDA a mixture of experts runs in bfloat16")
        stacked: StackedExperts = self._once(experts, stack_experts)
        routing = route(router_logits, top_k, renormalize)
        projected = grouped_linear(x.index_select(0, routing.order // top_k), stacked.gate_up, routing.ends)
        activated = self.empty((len(projected), projected.shape[1] // 2), x.dtype)
        self.gated_activation(activated, projected, kind)
        combine(out, grouped_linear(activated, stacked.down, routing.ends), routing)

    def _norm(self, out: Tensor, x: Tensor, norm: NarrowWeight, eps: float) -> None:
        (self._flashinfer.gemma_rmsnorm if norm.is_offset else self._flashinfer.rmsnorm)(x, norm.weight, eps, out=out)

    def _norm_heads(self, qk: Tensor, weight: Tensor, eps: float) -> None:
        runs: list[HeadRun] | None = self._once(weight, lambda weight: head_runs(weight, self._setup.dtype, self.device))
        if runs is None:
            qk.copy_(F.rms_norm(qk.float(), qk.shape[-1:], eps=eps).mul_(weight))
            return
        for first, end, narrowed in runs:
            self._flashinfer.rmsnorm(qk[:, first:end], narrowed, eps, out=qk[:, first:end])

    def _narrow(self, weight: Tensor) -> NarrowWeight:
        return self._once(weight, lambda weight: narrow(weight, self._setup.dtype, self.device))

    def _once(self, source: Any, prepare: Callable[[Any], W]) -> W:
        if id(source) not in self._prepared:
            self._prepared[id(source)] = source, prepare(source)
        prepared: W = self._prepared[id(source)][1]
        return prepared


def import_flashinfer() -> Any:
    """The real module. Raises DeviceError."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise DeviceError(f"device 'cuda' needs FlashInfer: pip install 'ferrum-rt[cuda]' ({error})") from error


def _check_dtypes(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    if dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported(f"dtype {dtype}: on CUDA the model runs in bfloat16 or float16")
    if kv_dtype not in (dtype, torch.float8_e4m3fn):
        raise Unsupported(f"kv_cache.dtype {kv_dtype}: with {dtype} the pages on CUDA hold {dtype} or fp8")
