"""TensorOps in plain torch: runs anywhere, and says what the other backends must compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.kernels.attention import append, attend, copy, plan_attention
from ferrum_rt.kernels.batch import TokenBatch
from ferrum_rt.kernels.int8 import Int8Linear, multiply, pack_int8, quantize


class Linear(NamedTuple):
    """weight.T [in, out] and bias [out]."""

    weight: Tensor
    bias: Tensor | None


class ReferenceOps:
    """Plain torch on one device."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def from_host(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def pack_linear(self, weight: Tensor, bias: Tensor | None, *, is_int8: bool = False) -> Any:
        return pack_int8(weight, bias) if is_int8 else Linear(weight.t(), bias)

    def plan_attention(self, batch: TokenBatch, kinds: Sequence[AttentionKind]) -> Any:
        return plan_attention(batch)

    def embed(self, out: Tensor, token_ids: Tensor, table: Tensor, scale: float) -> None:
        torch.index_select(table, 0, token_ids, out=out)
        if scale != 1.0:
            # The scale is rounded to the weights' type first, as the models that have one were trained.
            out.mul_(torch.tensor(scale, dtype=out.dtype))

    def linear(self, out: Tensor, x: Tensor, weight: Any) -> None:
        if isinstance(weight, Int8Linear):
            self._linear_int8(out, x, weight)
        elif weight.bias is None:
            torch.mm(x, weight.weight, out=out)
        else:
            torch.addmm(weight.bias, x, weight.weight, out=out)

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        wide = x.float()
        factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out.copy_(factor.mul(wide).mul_(weight))

    def add_rms_norm(self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        residual.add_(x)
        self.rms_norm(out, residual, weight, eps)

    def qk_norm_rope(self, qk: Tensor, norm_weight: Tensor | None, eps: float, positions: Tensor, cos_sin: Tensor) -> None:
        wide = qk.float()
        if norm_weight is not None:
            wide = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_().mul(wide).mul_(norm_weight)
        half = cos_sin.shape[1] // 2
        cos, sin = cos_sin.index_select(0, positions)[:, None].split(half, dim=-1)
        first, second, rest = wide.split([half, half, wide.shape[-1] - 2 * half], dim=-1)
        # All of it before any is written: in float32 these are views of qk.
        turned = first * cos - second * sin, second * cos + first * sin
        qk[..., :half], qk[..., half : 2 * half] = turned
        qk[..., 2 * half :] = rest

    def append_kv(self, layer: KvLayer[Tensor], kv: Tensor, kv_slots: Tensor) -> None:
        append(layer, kv, kv_slots)

    def copy_kv(self, layer: KvLayer[Tensor], sources: Tensor, targets: Tensor) -> None:
        copy(layer, sources, targets)

    def attention(self, out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Any, kind: AttentionKind) -> None:
        attend(out, q, layer, plan, kind)

    def gated_activation(self, out: Tensor, gate_up: Tensor, kind: str) -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
        torch.mul(activated, up, out=out)

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
        weights, chosen = torch.softmax(router_logits.float(), dim=-1).topk(top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out.zero_()
        for index in chosen.unique().tolist():
            gate_up, down = experts[index]
            rows, rank = (chosen == index).nonzero(as_tuple=True)
            projected = self._apply(gate_up, x.index_select(0, rows))
            activated = self.empty((len(rows), projected.shape[1] // 2), x.dtype)
            self.gated_activation(activated, projected, kind)
            result = self._apply(down, activated) * weights[rows, rank, None]
            out.index_add_(0, rows, result.to(out.dtype))

    def gather_rows(self, out: Tensor, x: Tensor, rows: Tensor) -> None:
        torch.index_select(x, 0, rows, out=out)

    def soft_cap(self, x: Tensor, cap: float) -> None:
        x.div_(cap).tanh_().mul_(cap)

    def _linear_int8(self, out: Tensor, x: Tensor, weight: Int8Linear) -> None:
        rounded, scales = quantize(x)
        result = self._multiply_int8(rounded, weight.weight).float().mul_(weight.scales * scales)
        out.copy_(result if weight.bias is None else result.add_(weight.bias))

    def _multiply_int8(self, x: Tensor, weight: Tensor) -> Tensor:
        """Exactly x [N, in] @ weight.T [in, out], in int32."""
        return multiply(x, weight)

    def _apply(self, weight: Any, x: Tensor) -> Tensor:
        out = self.empty((x.shape[0], self._out_features(weight)), x.dtype)
        self.linear(out, x, weight)
        return out

    def _out_features(self, weight: Any) -> int:
        return len(weight.weight) if isinstance(weight, Int8Linear) else int(weight.weight.shape[1])
