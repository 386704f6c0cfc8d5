"""Tensors as the contracts see them, and the kernels every backend provides.

``torch.Tensor`` satisfies TensorLike as it is. Nothing here imports torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class TensorLike(Protocol):
    """The part of an array that code outside the kernels may use."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def data_ptr(self) -> int: ...


TensorRef = TensorLike
"""A tensor that is borrowed: written or read in place, never kept. Python has one reference type for both."""


class TensorFactory(Protocol[T_co]):
    """Makes tensors where the backend computes. ``dtype`` is the backend's own (a torch.dtype)."""

    def empty(self, shape: Sequence[int], dtype: Any) -> T_co: ...
    def zeros(self, shape: Sequence[int], dtype: Any) -> T_co: ...
    def from_host(self, values: Any, dtype: Any) -> T_co: ...


class KvLayer(Protocol[T]):
    """The pages of one layer: for each token its keys, then its values, [pages * block_size, 2, kv heads, head dim], and
    their scales [pages * block_size, 2, kv heads] where the element type has them."""

    data: T
    scales: T | None


class AttentionKind(NamedTuple):
    """What layers that attend alike have in common. Scores are multiplied by ``scale`` and then capped to
    soft_cap * tanh(s / soft_cap); with a ``window`` a token sees itself and the ``window - 1`` before it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None


class TensorOps(TensorFactory[T], Protocol[T]):
    """The kernels of a decoder. Each writes into the ``out`` it is given and takes its sizes from its arguments' shapes,
    so that a backend can run a call (reference), capture it (CUDA graphs) or record it (a CPU step program).

    N is the number of tokens in the batch, R the rows that are sampled from.
    """

    def pack_linear(self, weight: T, bias: T | None, *, is_int8: bool = False) -> Any:
        """Turn weight [out, in] and bias [out] into whatever ``linear`` likes best. Called once, at load.

        With ``is_int8`` each row of the weight is rounded to -127 … 127 by a scale of its own, its largest magnitude / 127,
        and so is each row of x in ``linear``; their products add up exactly, and are then multiplied by both scales. Raises
        Unsupported where there is no kernel for that."""
        ...

    def plan_attention(self, batch: Any, kinds: Sequence[AttentionKind]) -> Any:
        """Everything about attention that is the same in every layer of a kind, in this step; ``batch`` is a TokenBatch."""
        ...

    def embed(self, out: T, token_ids: T, table: T, scale: float) -> None:
        """out [N, hidden] = table[token_ids] * scale."""
        ...

    def linear(self, out: T, x: T, weight: Any) -> None:
        """out [N, out] = x [N, in] @ weight.T + bias."""
        ...

    def rms_norm(self, out: T, x: T, weight: T, eps: float) -> None:
        """out = x / rms(x) * weight over the last axis (arXiv:1910.07467); ``out`` may be ``x``."""
        ...

    def add_rms_norm(self, out: T, residual: T, x: T, weight: T, eps: float) -> None:
        """residual += x, then out = rms_norm(residual); ``out`` may be ``x``."""
        ...

    def qk_norm_rope(self, qk: T, norm_weight: T | None, eps: float, positions: T, cos_sin: T) -> None:
        """Norm (where there is a weight [heads, dim]) and rotate the queries and keys qk [N, heads, dim] in place
        (arXiv:2104.09864, halves paired); cos_sin [positions, rotary dim] is cosines then sines."""
        ...

    def append_kv(self, layer: KvLayer[T], kv: T, kv_slots: T) -> None:
        """Write kv [N, 2, kv heads, dim] to rows ``kv_slots`` [N] of the layer's pages."""
        ...

    def copy_kv(self, layer: KvLayer[T], sources: T, targets: T) -> None:
        """Rows ``targets`` [M] of the layer's pages become what rows ``sources`` [M] are."""
        ...

    def attention(self, out: T, q: T, layer: KvLayer[T], plan: Any, kind: AttentionKind) -> None:
        """Causal attention of q [N, heads, dim] over the pages of each sequence, into out [N, heads * dim]; ``kind`` is one
        of those that ``plan`` was made for."""
        ...

    def gated_activation(self, out: T, gate_up: T, kind: str) -> None:
        """out [N, n] = act(gate_up[:, :n]) * gate_up[:, n:], with act ``silu`` or ``gelu_tanh``."""
        ...

    def mixture_of_experts(
        self, out: T, x: T, router_logits: T, experts: Sequence[Any], *, top_k: int, renormalize: bool, kind: str
    ) -> None:
        """out [N, hidden] = the ``top_k`` best experts' outputs weighted by the router's softmax; each expert is a pair of
        packed linears (gate_up, down)."""
        ...

    def gather_rows(self, out: T, x: T, rows: T) -> None:
        """out [R, hidden] = x[rows]."""
        ...

    def soft_cap(self, x: T, cap: float) -> None:
        """x = cap * tanh(x / cap), in place."""
        ...
