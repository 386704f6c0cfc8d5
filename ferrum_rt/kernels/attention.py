"""Paged attention in plain torch: the oracle for the other backends, and what the CPU runs on without a compiler.

One mechanism for decode and prefill: sequences that decode are grouped, so that a layer costs two batched matmuls however
many there are; a prefill chunk is a group of one sequence, cut into blocks of queries so that scores stay small.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ferrum_rt.interfaces.tensor import KvLayer
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch

QUERY_BLOCK = 256
FP8_MAX = 448.0


@dataclass(slots=True)
class AttentionGroup:
    """B sequences with n queries each over L keys. ``rows`` [B * n] are the queries' rows in the batch, ``kv_slots``
    [B * L] the keys' rows in the pages, and ``distance`` [B, n, L] how far each key lies behind each query; it is
    negative where there is none to see."""

    rows: Tensor
    kv_slots: Tensor
    distance: Tensor


def plan_attention(batch: TokenBatch) -> list[AttentionGroup]:
    """Group the batch's sequences so that padding at most doubles the work."""
    groups = []
    decodes = sorted((span for span in batch.spans if span.num_tokens == 1), key=lambda span: span.start)
    while decodes:
        longest = decodes[-1].start
        first = next(i for i, span in enumerate(decodes) if 2 * span.start >= longest - 64)
        groups.append(_group(batch, decodes[first:], 1))
        del decodes[first:]
    for span in batch.spans:
        for done in range(0, span.num_tokens if span.num_tokens > 1 else 0, QUERY_BLOCK):
            count = min(QUERY_BLOCK, span.num_tokens - done)
            groups.append(_group(batch, [QuerySpan(span.slot, span.row + done, count, span.start + done)], count))
    return groups


def _group(batch: TokenBatch, spans: list[QuerySpan], count: int) -> AttentionGroup:
    size = batch.block_size
    device = batch.positions.device
    first_rows = torch.tensor([span.row for span in spans], device=device)
    starts = torch.tensor([span.start for span in spans], device=device)
    slots = torch.tensor([span.slot for span in spans], device=device)
    length = max(span.start for span in spans) + count
    steps = torch.arange(count, device=device)
    keys = torch.arange(length, device=device)
    kv_slots = batch.block_tables[slots[:, None], keys // size] * size + keys % size
    distance = (starts[:, None] + steps)[:, :, None] - keys
    # Padding points at the sequence's own first token: whatever lies in a page that somebody else wrote could be NaN,
    # and a weight of 0 would not stop that.
    kv_slots = torch.where(keys < starts[:, None] + count, kv_slots, kv_slots[:, :1])
    return AttentionGroup((first_rows[:, None] + steps).flatten(), kv_slots.flatten(), distance)


def attend(
    out: Tensor,
    q: Tensor,
    pages: KvLayer[Tensor],
    groups: list[AttentionGroup],
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Attention of q [N, heads, dim] over the pages, into out [N, heads * dim]. Computes in float32."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = pages.keys.shape[1]
    shared = num_heads // num_kv_heads
    for group in groups:
        sequences, count, length = group.distance.shape
        queries = q.index_select(0, group.rows).view(sequences, count, num_kv_heads, shared, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).float().reshape(-1, shared * count, head_dim)
        keys = _gather(pages.keys, pages.key_scales, group.kv_slots, sequences)
        values = _gather(pages.values, pages.value_scales, group.kv_slots, sequences)
        scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        hidden = group.distance < 0
        if window is not None:
            hidden = hidden | (group.distance >= window)
        scores = scores.view(sequences, num_kv_heads, shared, count, length)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).view(-1, shared * count, length)
        result = torch.bmm(weights, values).view(sequences, num_kv_heads, shared, count, head_dim)
        flat = result.permute(0, 3, 1, 2, 4).reshape(sequences * count, num_heads * head_dim)
        out.index_copy_(0, group.rows, flat.to(out.dtype))


def _gather(pages: Tensor, scales: Tensor | None, kv_slots: Tensor, sequences: int) -> Tensor:
    """float32 [sequences * kv heads, keys, dim]."""
    _, num_kv_heads, head_dim = pages.shape
    # fp8 has no index_select of its own; its bytes have.
    raw = pages.view(torch.uint8) if pages.itemsize == 1 else pages
    picked = raw.index_select(0, kv_slots).view(pages.dtype).view(sequences, -1, num_kv_heads, head_dim)
    result = torch.empty((sequences, num_kv_heads, picked.shape[1], head_dim), dtype=torch.float32, device=pages.device)
    result.copy_(picked.transpose(1, 2))
    if scales is not None:
        result.mul_(scales.index_select(0, kv_slots).view(sequences, -1, num_kv_heads).transpose(1, 2)[..., None])
    return result.flatten(0, 1)


def append(pages: Tensor, scales: Tensor | None, x: Tensor, kv_slots: Tensor) -> None:
    """Write x [N, kv heads, dim] into the rows ``kv_slots`` [N] of ``pages``, converted to their type."""
    if scales is not None:
        magnitude = x.float().abs().amax(dim=-1).clamp_min_(1e-12) / 127.0
        scales.index_copy_(0, kv_slots, magnitude)
        x = (x.float() / magnitude[..., None]).round_()
    elif pages.dtype == torch.float8_e4m3fn:
        x = x.float().clamp_(-FP8_MAX, FP8_MAX)
    x = x.to(pages.dtype)
    if pages.itemsize == 1:
        pages, x = pages.view(torch.uint8), x.view(torch.uint8)
    pages.index_copy_(0, kv_slots, x)
