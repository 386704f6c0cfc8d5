"""The tensors of one step, as every backend gets them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class QuerySpan(NamedTuple):
    """The rows of one sequence: ``num_tokens`` from row ``row`` on, standing at positions ``start`` and following."""

    slot: int
    row: int
    num_tokens: int
    start: int


@dataclass(slots=True)
class TokenBatch:
    """N tokens of several sequences, R of which are sampled from. All tensors are int64.

    ``token_ids``, ``positions`` and ``kv_slots`` (the row in a layer's pages that each token's K/V goes to) are [N];
    ``logit_rows`` is [R]; ``block_tables`` [slots, pages] and ``block_size`` say where a slot's earlier tokens lie.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    logit_rows: Tensor
    spans: list[QuerySpan]
    block_tables: Tensor
    block_size: int


@dataclass(slots=True)
class KvPages:
    """The KvLayer of torch backends."""

    data: Tensor
    scales: Tensor | None = None


def allocate_pages(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> KvPages:
    """One layer's pages for ``num_tokens`` tokens; int8 pages come with scales. Not cleared: the system maps memory when it
    is first written, and nobody reads before. Raises MemoryError."""
    shape = (num_tokens, 2, num_kv_heads, head_dim)
    try:
        data = torch.empty(shape, dtype=dtype, device=device)
        scales = torch.empty(shape[:3], dtype=torch.float32, device=device) if dtype == torch.int8 else None
    except RuntimeError as error:
        raise MemoryError(f"no memory for pages of shape {list(shape)}") from error
    return KvPages(data, scales)
