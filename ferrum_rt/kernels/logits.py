"""Changes to logits before a token is drawn: penalties, biases, and tokens that may not come. All in place, on workspace
rows [R, width] (see ``sampling.workspace``), on whatever device they are.

A row's column ``dummy`` is no token: what is meant for no token goes there.
"""

import math

import torch
from torch import Tensor

ALL_BITS = 0xFF


def penalize_repetition(x: Tensor, token_ids: Tensor, penalty: Tensor) -> None:
    """Divide by ``penalty`` [R] what is above 0, multiply what is below, once for each token in ``token_ids`` [R, L]
    (arXiv:1909.05858). Repeated ids write the same value, so they count once."""
    found = x.gather(1, token_ids)
    x.scatter_(1, token_ids, torch.where(found > 0, found / penalty[:, None], found * penalty[:, None]))


def penalize_presence(x: Tensor, token_ids: Tensor, presence: Tensor, frequency: Tensor) -> None:
    """Subtract ``presence`` [R] once from each token in ``token_ids`` [R, L], and ``frequency`` [R] each time it occurs."""
    x.scatter_(1, token_ids, x.gather(1, token_ids) - presence[:, None])
    x.scatter_add_(1, token_ids, (-frequency)[:, None].expand(token_ids.shape))


def add_bias(x: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """x[rows, token_ids] += bias, all [P]; a pair occurs once."""
    x[rows, token_ids] += bias


def forbid(x: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """The tokens of these pairs [P] cannot be drawn."""
    x[rows, token_ids] = -math.inf


def forbid_words(x: Tensor, rows: Tensor, words: Tensor, tails: Tensor, dummy: int) -> None:
    """Forbid the last token of each of ``words`` [W, L] in row ``rows`` [W] whose ``tails`` [W, L - 1], the tokens before
    the one to come, are the rest of it. Words stand at the right, filled up with -1, which matches anything."""
    begun = ((words[:, :-1] == tails) | (words[:, :-1] < 0)).all(dim=1)
    x[rows, torch.where(begun, words[:, -1], dummy)] = -math.inf


def bit_table(device: torch.device | str) -> Tensor:
    """[256, 8]: for each byte of a mask 0 where its bit is set, -inf where it is not. Looking it up is an order of
    magnitude faster on a CPU than masks of booleans."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return torch.where(bits > 0, 0.0, -math.inf)


def allow_only(x: Tensor, masks: Tensor, table: Tensor) -> None:
    """Forbid the tokens whose bit in ``masks`` uint8 [R, bytes] is 0; ``table`` is ``bit_table``'s."""
    width = masks.shape[1] * 8
    x[:, :width] += torch.nn.functional.embedding(masks.int(), table).view(len(masks), width)[:, : x.shape[1]]


def mask_of(token_ids: Tensor, num_bytes: int) -> Tensor:
    """uint8 [num_bytes] with the bits of these tokens set."""
    bits = torch.zeros((num_bytes, 8), dtype=torch.uint8, device=token_ids.device)
    bits.view(-1)[token_ids] = 1
    weights = 1 << torch.arange(8, device=token_ids.device)
    return (bits * weights).sum(dim=1).to(torch.uint8)
