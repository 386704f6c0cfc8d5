"""Paged attention as instructions; ``native/attention.h`` says the same in C++."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.kernels.batch import TokenBatch
from ferrum_rt.kernels.cpu.program import TYPES

_ROWS = 128  # of a work item: tokens times the heads that share keys
_NO_WINDOW = 1 << 62


class AttentionPlan(NamedTuple):
    """What a step's attention consists of. ``spans`` [S, 4] is int64, each row a QuerySpan: a recorded step reads as many of
    them as its batch has. ``items`` is the table that the plan's instruction writes, of ``tokens`` a work item."""

    spans: Tensor
    items: Tensor
    tokens: int
    block_tables: Tensor
    block_size: int


def make_plan(batch: TokenBatch, kinds: Sequence[AttentionKind]) -> AttentionPlan:
    """For a batch with the spans and tokens of this one, or fewer of either."""
    tokens = max(1, _ROWS // max(kind.num_heads // kind.num_kv_heads for kind in kinds))
    spans = torch.tensor(batch.spans, dtype=torch.int64).reshape(-1, 4)
    # A span's last item may be short.
    num_items = len(batch.spans) + len(batch.positions) // tokens
    items = torch.zeros(1 + 3 * num_items, dtype=torch.int64)
    return AttentionPlan(spans, items, tokens, batch.block_tables, batch.block_size)


def plan_words(plan: AttentionPlan) -> tuple[int, ...]:
    return plan.spans.data_ptr(), plan.items.data_ptr(), plan.tokens


def append_words(layer: KvLayer[Tensor], kv: Tensor, kv_slots: Tensor) -> tuple[int, ...]:
    _, _, heads, dim = kv.shape
    return (
        *_pages(layer), heads, dim, kv.data_ptr(), *kv.stride()[:3], kv_slots.data_ptr(),
    )  # fmt: skip


def attention_words(
    out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: AttentionPlan, kind: AttentionKind
) -> tuple[int | float, ...]:
    return (
        out.data_ptr(), out.stride(0), q.data_ptr(), q.stride(0), q.stride(1), *_pages(layer), kind.num_kv_heads,
        kind.num_heads // kind.num_kv_heads, kind.head_dim, plan.spans.data_ptr(), plan.items.data_ptr(),
        plan.block_tables.data_ptr(), plan.block_tables.stride(0), plan.block_size,
        _NO_WINDOW if kind.window is None else kind.window, float(kind.scale), float(kind.soft_cap or 0.0),
    )  # fmt: skip


def _pages(layer: KvLayer[Tensor]) -> tuple[int, int, int]:
    return layer.data.data_ptr(), 0 if layer.scales is None else layer.scales.data_ptr(), TYPES[layer.data.dtype]
