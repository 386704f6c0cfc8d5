"""Drawing tokens from logits, on whatever device they are.

Randomness is one uniform number per token, computed from (seed, position, sample) alone, then the inverse of the
cumulative distribution: what else is in the batch cannot change a draw. No row is ever sorted whole if a part will do:
maxima of blocks say where the candidates are.

Work is done in ``Workspace`` rows: float32, [R, width], of which ``vocab_size`` columns are tokens and the others -inf.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_BLOCK = 128
_SMALL_BLOCK = 16
_MORE = 16
NUM_CANDIDATES = 256
"""How many of the likeliest tokens are looked at first where top_k sets no bound."""


def uniform(seeds: Tensor, positions: Tensor, samples: Tensor) -> Tensor:
    """float64 in [0, 1) for each triple of int64, by rounds of SplitMix64's finalizer (Steele et al., OOPSLA 2014)."""
    mixed = _mix(seeds + _GOLDEN)
    mixed = _mix(mixed + (samples + 1) * _GOLDEN)
    mixed = _mix(mixed + (positions + 1) * _GOLDEN)
    return ((mixed >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def workspace(num_rows: int, vocab_size: int, device: torch.device | str) -> Tensor:
    """Rows to work in, with at least one column that is no token."""
    width = (vocab_size // _BLOCK + 1) * _BLOCK
    return torch.full((num_rows, width), -math.inf, device=device)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(values, ids) [R] of the first largest entry of each row of logits [R, V]; NaN counts as largest."""
    vocab_size = logits.shape[1]
    whole = vocab_size - vocab_size % _BLOCK
    if whole == 0:
        values, ids = logits.max(dim=-1)
        return values, ids
    maxima = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(dim=-1)
    if whole < vocab_size:
        maxima = torch.cat([maxima, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    starts = (maxima.argmax(dim=-1) * _BLOCK).clamp_(max=vocab_size - _BLOCK)
    columns = starts[:, None] + torch.arange(_BLOCK, device=logits.device)
    values, within = logits.gather(1, columns).max(dim=-1)
    return values, starts + within


def top_candidates(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values, ids) [R, count] of the largest entries of each workspace row, best first, of equal ones the lowest id
    first. The ``count`` largest lie in the ``count`` blocks with the largest maxima, and so on inside of those."""
    count = min(count, x.shape[1])
    ids = torch.arange(x.shape[1], device=x.device).expand_as(x)
    for size in (_BLOCK, _SMALL_BLOCK):
        num_blocks = x.shape[1] // size
        if num_blocks > count:
            chosen = _best_blocks(x.unflatten(1, (num_blocks, size)).amax(dim=-1), count)
            ids = _take_blocks(ids, chosen, size)
            x = _take_blocks(x, chosen, size)
    values, order = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[:, :count], ids.gather(1, order[:, :count])


def _best_blocks(maxima: Tensor, count: int) -> Tensor:
    """Blocks [R, count] in ascending order. Sorting stably prefers the lowest among equals, which topk does not promise."""
    return torch.sort(maxima, dim=-1, descending=True, stable=True).indices[:, :count].sort(dim=-1).values


def _take_blocks(x: Tensor, chosen: Tensor, size: int) -> Tensor:
    rows, count = chosen.shape
    if x.stride(0) == 0:  # the same for every row
        return x[0].view(-1, size)[chosen].view(rows, -1)
    num_blocks = x.shape[1] // size
    flat = chosen + torch.arange(rows, device=x.device)[:, None] * num_blocks
    return x.reshape(-1, size).index_select(0, flat.view(-1)).view(rows, count * size)


def log_sum_exp(x: Tensor, highest: Tensor) -> Tensor:
    """[R] of workspace rows whose maxima are ``highest``; the rows are used up."""
    return _total(x.sub_(highest[:, None]).exp_()).log_().add_(highest)


def draw(x: Tensor, highest: Tensor, temperature: Tensor, draws: Tensor) -> Tensor:
    """Token ids [R], drawn from workspace rows whose whole vocabulary is in play. The rows are used up."""
    weights = x.sub_(highest[:, None]).div_(temperature[:, None]).exp_()
    blocks = weights.unflatten(1, (-1, _BLOCK))
    cumulative = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = draws * cumulative[:, -1]
    block = _invert(cumulative, targets)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(len(x), device=x.device), block].cumsum(dim=-1, dtype=torch.float64)
    return block * _BLOCK + _invert(inside, targets - before)


class Truncation(NamedTuple):
    """How each row's distribution is cut, all [R]: the ``top_k`` likeliest (0 for all), of them the fewest that reach
    ``top_p``, of them those of at least ``min_p`` times the likeliest; of what is left, the fewest that are nearest to the
    expected surprise and reach ``typical_p`` (arXiv:2202.00666): transformers' order. Before that, tokens whose surprise
    is above ``max_surprise`` bits are cut too (Mirostat; inf for none). Only ``typical_p`` can cut the likeliest."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    max_surprise: Tensor

    def rows(self, index: Tensor) -> "Truncation":
        return Truncation(*(field[index] for field in self))


def draw_truncated(x: Tensor, highest: Tensor, cut: Truncation, draws: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """(token ids, their surprise in bits) [R], drawn from what ``cut`` leaves of workspace rows, which stay as they are.

    The ``count`` likeliest are looked at first, which must be at least every top_k; then more, for the rows where they may
    not be all that is left. What a row draws does not depend on ``count``: candidates are always in the order of their
    logits, since different logits may have equal weights.
    """
    logits, ids = top_candidates(x, count)
    weights = _weigh(logits, highest, cut.temperature)
    if bool((cut.top_k > 0).all()):
        return _draw_kept(truncate(weights, cut, None)[0], ids, draws)
    total = _total(_weigh(x, highest, cut.temperature))
    kept, is_whole = truncate(weights, cut, total)
    tokens, surprise = _draw_kept(kept, ids, draws)
    while count < x.shape[1] and len(rest := (~is_whole).nonzero()[:, 0]):
        count *= _MORE
        logits, ids = top_candidates(x[rest], count)
        weights = _weigh(logits, highest[rest], cut.temperature[rest])
        kept, is_whole[rest] = truncate(weights, cut.rows(rest), total[rest])
        tokens[rest], surprise[rest] = _draw_kept(kept, ids, draws[rest])
    return tokens, surprise


def _total(weights: Tensor) -> Tensor:
    """[R], added up in an order that depends on nothing but the width."""
    blocks: Tensor = weights.unflatten(1, (-1, _BLOCK))
    return blocks.sum(dim=-1).sum(dim=-1)


def _weigh(logits: Tensor, highest: Tensor, temperature: Tensor) -> Tensor:
    return (logits - highest[:, None]).div_(temperature[:, None]).exp_()


def truncate(weights: Tensor, cut: Truncation, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """The descending ``weights`` [R, K], the likeliest's being 1, with what is cut at 0; and [R] whether all tokens beyond
    the K are cut too. ``total`` [R] is the weight of a row's whole vocabulary; rows with top_k need none."""
    rank = torch.arange(weights.shape[1], device=weights.device)
    limit = torch.where(cut.top_k > 0, cut.top_k, weights.shape[1])
    kept = weights.masked_fill(rank >= limit[:, None], 0.0)
    cumulative = kept.cumsum(dim=-1, dtype=torch.float64)
    sums = cumulative[:, -1]
    total = sums if total is None else torch.where(cut.top_k > 0, sums, total.double())

    enough = torch.where(cut.top_p < 1, cut.top_p * total, math.inf)
    is_cut = cumulative - kept >= enough[:, None]
    rarest = (cut.max_surprise.double() * -math.log(2)).exp()  # exp2 would round a row's value by its place in the batch
    is_cut |= kept < torch.maximum(cut.min_p, total * rarest)[:, None]
    is_cut |= kept <= 0
    is_cut[:, 0] = False
    is_whole = is_cut[:, -1] | (cut.top_k > 0)
    kept = kept.masked_fill(is_cut, 0.0)
    if bool((cut.typical_p < 1).any()):
        kept = _keep_typical(kept, cut.typical_p)
    return kept, is_whole


def _keep_typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    probs = weights / _sums(weights)
    surprise = -probs.log()
    entropy = _sums((probs * surprise).nan_to_num_(0.0))
    distance = (surprise - entropy).abs()  # inf where the weight is 0
    ordered, order = torch.sort(distance, dim=-1, stable=True)
    reached = probs.gather(1, order).cumsum(dim=-1)
    last = (reached < typical_p[:, None]).sum(dim=-1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    is_cut = (distance > ordered.gather(1, last)) & (typical_p < 1)[:, None]
    return weights.masked_fill(is_cut, 0.0)


def _sums(x: Tensor) -> Tensor:
    """[R, 1], term by term: ``sum`` would add in an order that depends on how many zeros follow."""
    return x.cumsum(dim=-1, dtype=torch.float64)[:, -1:]


def _draw_kept(kept: Tensor, ids: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    cumulative = kept.cumsum(dim=-1, dtype=torch.float64)
    picked = _invert(cumulative, draws * cumulative[:, -1])[:, None]
    share = kept.gather(1, picked)[:, 0] / cumulative[:, -1]
    return ids.gather(1, picked)[:, 0], -share.log2()


def _invert(cumulative: Tensor, targets: Tensor) -> Tensor:
    """[R] the first entry whose cumulative weight is above the target; the last with any weight where rounding would
    point past it. A row of NaN gets some entry: it must not take the others with it."""
    picked = torch.searchsorted(cumulative, targets[:, None], right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(picked, last)[:, 0].clamp_(max=cumulative.shape[1] - 1)
