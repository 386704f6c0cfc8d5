"""Paged attention in plain torch: the oracle for the other backends, and what the CPU runs on without a compiler.

One mechanism for decode and prefill: sequences that decode are grouped, so that a layer costs one call however many there
are (one call per sequence was measured 20 times slower); a prefill chunk is a group of one sequence, cut into blocks of
queries so that masks and scores stay small and a block sees no keys behind its last query.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch

QUERY_BLOCK = 256
FP8_MAX = 448.0


@dataclass(slots=True)
class AttentionGroup:
    """B sequences with n queries each over L keys. ``rows`` [B * n] are the queries' rows in the batch, or None if they are
    all its rows in order; ``kv_slots`` [B, L] are the keys' rows in the pages; ``distance`` [B, n, L] says how far each key
    lies behind each query, and is negative where there is none to see.

    What follows from these is the same in every layer of a kind, so it is worked out once.
    """

    rows: Tensor | None
    kv_slots: Tensor
    distance: Tensor
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    kv_rows: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, shared: int, window: int | None) -> Tensor:
        """Which keys a query sees, [B, 1, shared * n, L], for heads that stand as ``shared`` queries."""
        if (shared, window) not in self.masks:
            seen = self.distance >= 0
            if window is not None:
                seen &= self.distance < window
            self.masks[shared, window] = seen.repeat(1, shared, 1)[:, None]
        return self.masks[shared, window]

    def head_rows(self, num_kv_heads: int) -> Tensor:
        """[2 * B * kv heads * L]: for pages seen as rows of one head, where each head's keys lie, then its values."""
        if num_kv_heads not in self.kv_rows:
            heads = torch.arange(2 * num_kv_heads, device=self.kv_slots.device).view(2, 1, num_kv_heads, 1)
            self.kv_rows[num_kv_heads] = (self.kv_slots[:, None] * 2 * num_kv_heads + heads).flatten()
        return self.kv_rows[num_kv_heads]


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
    rows = (first_rows[:, None] + steps).flatten()
    # Asked on the host: a device would have to be waited for.
    is_whole = [span.row for span in spans] == list(range(0, len(batch.positions), count))
    return AttentionGroup(None if is_whole else rows, kv_slots, distance)


def attend(out: Tensor, q: Tensor, pages: KvLayer[Tensor], groups: list[AttentionGroup], kind: AttentionKind) -> None:
    """Attention of q [N, heads, dim] over the pages, into out [N, heads * dim]."""
    num_heads, num_kv_heads, head_dim = kind.num_heads, kind.num_kv_heads, kind.head_dim
    shared = num_heads // num_kv_heads
    for group in groups:
        sequences, count, length = group.distance.shape
        # The heads that share keys stand as further queries beside each other: [sequences, kv heads, shared * n, dim].
        queries = q if group.rows is None else q.index_select(0, group.rows)
        queries = queries.reshape(sequences, count, num_kv_heads, shared, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(sequences, num_kv_heads, shared * count, head_dim)
        keys, values = _gather(pages, group.head_rows(num_kv_heads), q.dtype).view(
            2, sequences, num_kv_heads, length, head_dim
        )
        mask = group.mask(shared, kind.window)
        if kind.soft_cap is None:
            result = _attend(queries, keys, values, mask, kind.scale)
        else:
            result = _soft_capped(queries, keys, values, mask, kind.scale, kind.soft_cap)
        result = result.reshape(sequences, num_kv_heads, shared, count, head_dim).permute(0, 3, 1, 2, 4)
        if group.rows is None:
            out.view(result.shape).copy_(result)
        else:
            out.index_copy_(0, group.rows, result.reshape(sequences * count, num_heads * head_dim))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    if q.shape[2] == 1:
        # For a single query torch takes a way that was measured six times slower than for two.
        return _attend(q.expand(-1, -1, 2, -1), k, v, mask, scale)[:, :, :1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, soft_cap: float) -> Tensor:
    """What torch's own attention cannot do."""
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale)
    scores.div_(soft_cap).tanh_().mul_(soft_cap).masked_fill_(~mask, -torch.inf)
    return torch.matmul(torch.softmax(scores, dim=-1), v.float()).to(q.dtype)


def _gather(pages: KvLayer[Tensor], rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, dim] in ``dtype``, of the pages seen as rows of one head."""
    picked = _bytes(pages.data).view(-1, pages.data.shape[-1]).index_select(0, rows).view(pages.data.dtype).to(dtype)
    return picked if pages.scales is None else picked.mul_(pages.scales.view(-1).index_select(0, rows)[:, None])


def append(pages: KvLayer[Tensor], kv: Tensor, kv_slots: Tensor) -> None:
    """Write kv [N, 2, kv heads, dim] into the rows ``kv_slots`` [N] of the pages, converted to their type."""
    if pages.scales is not None:
        scales = kv.float().abs().amax(dim=-1).clamp_min_(1e-12) / 127.0
        pages.scales.index_copy_(0, kv_slots, scales)
        kv = (kv.float() / scales[..., None]).round_()
    elif pages.data.dtype == torch.float8_e4m3fn:
        kv = kv.float().clamp_(-FP8_MAX, FP8_MAX)
    _bytes(pages.data).index_copy_(0, kv_slots, _bytes(kv.to(pages.data.dtype)))


def copy(pages: KvLayer[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Rows ``targets`` [M] of the pages become what rows ``sources`` [M] are."""
    data = _bytes(pages.data)
    data.index_copy_(0, targets, data.index_select(0, sources))
    if pages.scales is not None:
        pages.scales.index_copy_(0, targets, pages.scales.index_select(0, sources))


def _bytes(x: Tensor) -> Tensor:
    """fp8 has no indexing of its own; its bytes have."""
    return x.view(torch.uint8) if x.itemsize == 1 else x
