"""The one decoder. A model family is a DecoderSpec; a device is a TensorOps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind, TensorOps
from ferrum_rt.kernels.batch import KvPages, TokenBatch
from ferrum_rt.runtime.models.families import DecoderSpec, MoeSpec, Part, decoder_parts, kv_scale_names, layer_parts
from ferrum_rt.runtime.models.rope import RopeSpec, cos_sin_table
from ferrum_rt.runtime.models.weights import WeightReader


@dataclass(slots=True)
class DenseMlp:
    gate_up: Any
    down: Any


@dataclass(slots=True)
class MoeMlp:
    router: Any
    experts: list[tuple[Any, Any]]


@dataclass(slots=True)
class Layer:
    """One layer's weights; a norm is None where the family has none there."""

    qkv: Any
    o: Any
    mlp: DenseMlp | MoeMlp
    attn_in_norm: Tensor
    mlp_in_norm: Tensor
    attn_out_norm: Tensor | None
    mlp_out_norm: Tensor | None
    qk_norm: Tensor | None
    cos_sin: Tensor
    attention: AttentionKind


@dataclass(slots=True)
class Weights:
    """A whole model, ready for a backend. ``num_bytes`` is the memory that it takes, packed and with rotary tables."""

    embed: Tensor
    lm_head: Any
    norm: Tensor
    layers: list[Layer]
    num_parameters: int
    num_bytes: int


def load_weights(
    spec: DecoderSpec,
    reader: WeightReader,
    ops: TensorOps[Tensor],
    dtype: torch.dtype,
    max_model_len: int,
    progress: Callable[[int, int], None],
    *,
    is_int8: bool = False,
    has_fp8_pages: bool = False,
) -> Weights:
    """Check every tensor, then read them in ``dtype``. With ``is_int8`` the linear layers are rounded to int8, but for the
    routers, which are small and choose. With ``has_fp8_pages`` a checkpoint's scales for these become part of the weights.
    ``progress`` is told the layers done and the layers there are."""
    outer = decoder_parts(spec)
    by_layer = [layer_parts(spec, index) for index in range(len(spec.layers))]
    reader.check([*outer.values(), *(part for parts in by_layer for part in parts.values())])
    loader = _Loader(spec, reader, ops, dtype, max_model_len, is_int8, has_fp8_pages)
    layers = []
    for index, parts in enumerate(by_layer):
        progress(index, len(by_layer))
        layers.append(loader.layer(index, parts))
    embed = loader.tensor(outer["embed"])
    lm_head = ops.pack_linear(embed, None, is_int8=is_int8) if spec.is_tied else loader.linear(outer, "lm_head")
    norm = loader.norm(outer, "norm")
    progress(len(by_layer), len(by_layer))
    assert norm is not None  # every family has a final norm
    return Weights(embed, lm_head, norm, layers, loader.num_parameters, _num_bytes([embed, lm_head, norm, layers]))


def _num_bytes(parts: list[Any]) -> int:
    """Of the memory behind the tensors in these; a tied weight may be one memory, seen twice."""
    found: dict[int, int] = {}
    for tensor in _tensors(parts):
        if tensor.is_mkldnn:  # its memory is oneDNN's
            found[id(tensor)] = tensor.nbytes
        else:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _tensors(item)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


def attention_kind(spec: DecoderSpec, layer: int) -> AttentionKind:
    """How a layer attends."""
    return AttentionKind(
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.attention_scale,
        spec.layers[layer].window,
        spec.attention_soft_cap,
    )


class _Loader:
    """Turns parts of a checkpoint into what the ops want."""

    def __init__(
        self,
        spec: DecoderSpec,
        reader: WeightReader,
        ops: TensorOps[Tensor],
        dtype: torch.dtype,
        max_model_len: int,
        is_int8: bool,
        has_fp8_pages: bool,
    ) -> None:
        self._spec, self._reader, self._ops, self._dtype = spec, reader, ops, dtype
        self._max_model_len, self._is_int8, self._has_fp8_pages = max_model_len, is_int8, has_fp8_pages
        self._tables: list[tuple[RopeSpec, Tensor]] = []
        self.num_parameters = 0

    def layer(self, index: int, parts: dict[str, Part]) -> Layer:
        spec = self._spec.layers[index]
        keys, values = self._kv_scale(index, "k"), self._kv_scale(index, "v")
        return Layer(
            qkv=self.linear(parts, "qkv", rows=self._qkv_factors(keys, values)),
            o=self.linear(parts, "o", factor=values),
            mlp=self._moe(parts, self._spec.moe) if self._spec.moe and spec.is_moe else self._dense(parts),
            attn_in_norm=self._needed_norm(parts, "attn_in_norm"),
            mlp_in_norm=self._needed_norm(parts, "mlp_in_norm"),
            attn_out_norm=self.norm(parts, "attn_out_norm"),
            mlp_out_norm=self.norm(parts, "mlp_out_norm"),
            qk_norm=self._qk_norm(parts, keys),
            cos_sin=self._cos_sin(spec.rope),
            attention=attention_kind(self._spec, index),
        )

    def tensor(self, part: Part) -> Tensor:
        weight = self._reader.read(part, self._dtype)
        self.num_parameters += weight.numel()
        return weight

    def linear(self, parts: dict[str, Part], name: str, *, rows: Tensor | None = None, factor: float = 1.0) -> Any:
        """``rows`` [out] multiplies what comes out, ``factor`` what goes in."""
        weight, part = self.tensor(parts[name]), parts.get(name + "_bias")
        bias = self.tensor(part) if part else None
        if factor != 1:
            weight.mul_(factor)
        if rows is not None:
            weight.mul_(rows.to(weight)[:, None])
            if bias is not None:
                bias.mul_(rows.to(bias))
        return self._ops.pack_linear(weight, bias, is_int8=self._is_int8)

    def _kv_scale(self, index: int, which: str) -> float:
        """What this layer's keys or values are divided by before they are put into pages of fp8, so that they make the most
        of its range: the checkpoint's scale, but the nearest power of two. That has the range too, and as a factor of
        weights it changes no digit of any number."""
        scale = self._reader.read_scale(kv_scale_names(index, which)) if self._has_fp8_pages else None
        return 1.0 if scale is None else 2.0 ** round(math.log2(scale))

    def _qkv_factors(self, keys: float, values: float) -> Tensor | None:
        """Of the rows that make queries, keys and values: queries grow by what keys shrink. Where both are normed, the norms
        do that."""
        if keys == values == 1:
            return None
        spec = self._spec
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        of_qk = 1.0 if spec.has_qk_norm else keys
        return torch.cat([torch.full((q,), of_qk), torch.full((kv,), 1 / of_qk), torch.full((kv,), 1 / values)])

    def norm(self, parts: dict[str, Part], name: str) -> Tensor | None:
        """Norm weights stay in float32: they are few, and 1 + w would lose w's low bits in less."""
        if name not in parts:
            return None
        weight = self._reader.read(parts[name], torch.float32)
        self.num_parameters += weight.numel()
        return weight + self._spec.norm_offset

    def _qk_norm(self, parts: dict[str, Part], keys: float) -> Tensor | None:
        """[heads + kv heads, dim]: one weight a head, so that queries and keys are normed together."""
        q, k = self.norm(parts, "q_norm"), self.norm(parts, "k_norm")
        if q is None or k is None:
            return None
        return torch.cat([(q * keys).expand(self._spec.num_heads, -1), (k / keys).expand(self._spec.num_kv_heads, -1)])

    def _needed_norm(self, parts: dict[str, Part], name: str) -> Tensor:
        weight = self.norm(parts, name)
        assert weight is not None
        return weight

    def _dense(self, parts: dict[str, Part]) -> DenseMlp:
        return DenseMlp(self.linear(parts, "gate_up"), self.linear(parts, "down"))

    def _moe(self, parts: dict[str, Part], moe: MoeSpec) -> MoeMlp:
        experts = [
            (self.linear(parts, f"expert_{index}_gate_up"), self.linear(parts, f"expert_{index}_down"))
            for index in range(moe.num_experts)
        ]
        return MoeMlp(self._ops.pack_linear(self.tensor(parts["router"]), None), experts)

    def _cos_sin(self, rope: RopeSpec) -> Tensor:
        for known, table in self._tables:
            if known == rope:
                return table
        values = cos_sin_table(rope, self._max_model_len)
        table = self._ops.empty(values.shape, values.dtype).copy_(values)
        self._tables.append((rope, table))
        return table


class Decoder:
    """Runs batches of up to ``max_tokens`` tokens, and gives logits for up to ``max_rows`` of them at a time, in buffers of
    its own."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        ops: TensorOps[Tensor],
        dtype: torch.dtype,
        max_tokens: int,
        max_rows: int,
    ) -> None:
        self.spec, self.weights, self.ops = spec, weights, ops
        self.attention_kinds = list(dict.fromkeys(layer.attention for layer in weights.layers))
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        wide = spec.intermediate_size
        self._residual, self._x, self._y = (ops.empty((max_tokens, spec.hidden_size), dtype) for _ in range(3))
        self._qkv = ops.empty((max_tokens, q + 2 * kv), dtype)
        self._attended = ops.empty((max_tokens, q), dtype)
        self._gate_up = ops.empty((max_tokens, 2 * wide), dtype)
        self._activated = ops.empty((max_tokens, wide), dtype)
        self._router = ops.empty((max_tokens, spec.moe.num_experts if spec.moe else 0), dtype)
        self._last = ops.empty((max_rows, spec.hidden_size), dtype)
        self._logits = ops.empty((max_rows, spec.vocab_size), dtype)

    def plan_attention(self, batch: TokenBatch) -> Any:
        """What ``forward`` wants to know of the batch's sequences."""
        return self.ops.plan_attention(batch, self.attention_kinds)

    def forward(self, batch: TokenBatch, plan: Any, cache: list[KvPages]) -> Tensor:
        """What the layers make of the tokens: [N, hidden], valid until the next call. ``cache`` has a KvPages per layer."""
        ops, spec, eps = self.ops, self.spec, self.spec.norm_eps
        num_tokens = len(batch.token_ids)
        residual, x, y = self._residual[:num_tokens], self._x[:num_tokens], self._y[:num_tokens]

        ops.embed(residual, batch.token_ids, self.weights.embed, spec.embed_scale)
        for index, layer in enumerate(self.weights.layers):
            if index == 0:
                ops.rms_norm(x, residual, layer.attn_in_norm, eps)
            else:
                ops.add_rms_norm(y, residual, y, layer.attn_in_norm, eps)
                x, y = y, x
            self._attention(y, x, layer, cache[index], batch, plan)
            if layer.attn_out_norm is not None:
                ops.rms_norm(y, y, layer.attn_out_norm, eps)
            ops.add_rms_norm(y, residual, y, layer.mlp_in_norm, eps)
            x, y = y, x
            self._mlp(y, x, layer.mlp)
            if layer.mlp_out_norm is not None:
                ops.rms_norm(y, y, layer.mlp_out_norm, eps)
        ops.add_rms_norm(y, residual, y, self.weights.norm, eps)
        return y

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[R, vocabulary] for these rows of ``hidden``, valid until the next call."""
        ops, num_rows = self.ops, len(rows)
        last, logits = self._last[:num_rows], self._logits[:num_rows]
        ops.gather_rows(last, hidden, rows)
        ops.linear(logits, last, self.weights.lm_head)
        if self.spec.final_soft_cap is not None:
            ops.soft_cap(logits, self.spec.final_soft_cap)
        return logits

    def _attention(self, out: Tensor, x: Tensor, layer: Layer, pages: KvPages, batch: TokenBatch, plan: Any) -> None:
        ops, spec = self.ops, self.spec
        qkv, attended = self._qkv[: len(x)], self._attended[: len(x)]
        ops.linear(qkv, x, layer.qkv)
        heads = qkv.view(len(qkv), -1, spec.head_dim)  # the queries', the keys', the values'
        num_qk = spec.num_heads + spec.num_kv_heads
        ops.qk_norm_rope(heads[:, :num_qk], layer.qk_norm, spec.norm_eps, batch.positions, layer.cos_sin)
        kv = heads[:, spec.num_heads :].view(len(qkv), 2, spec.num_kv_heads, spec.head_dim)
        ops.append_kv(pages, kv, batch.kv_slots)
        ops.attention(attended, heads[:, : spec.num_heads], pages, plan, layer.attention)
        ops.linear(out, attended, layer.o)

    def _mlp(self, out: Tensor, x: Tensor, mlp: DenseMlp | MoeMlp) -> None:
        ops, spec = self.ops, self.spec
        if isinstance(mlp, DenseMlp):
            gate_up, activated = self._gate_up[: len(x)], self._activated[: len(x)]
            ops.linear(gate_up, x, mlp.gate_up)
            ops.gated_activation(activated, gate_up, spec.activation)
            ops.linear(out, activated, mlp.down)
            return
        assert spec.moe is not None  # a MoeMlp is only made from one
        router = self._router[: len(x)]
        ops.linear(router, x, mlp.router)
        ops.mixture_of_experts(
            out,
            x,
            router,
            mlp.experts,
            top_k=spec.moe.top_k,
            renormalize=spec.moe.renormalize,
            kind=spec.activation,
        )
