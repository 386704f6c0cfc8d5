"""Drawing tokens from logits, on whatever device they are.

Randomness is one uniform number per token, computed from (seed, position, sample) alone, then the inverse of the
cumulative distribution: what else is in the batch cannot change a draw. No row is ever sorted whole if a part will do:
maxima of blocks say where the candidates are.

Work is done in rows of ``workspace``: float32, [R, width], of which ``vocab_size`` columns are tokens and the others -inf.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_BLOCK = 128
_SMALL_BLOCK = 16
_NUM_BINS = (0x3F800000 >> 16) + 1  # of floats from 0 to 1, by the upper half of their bits
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
    return pick(x.sub_(highest[:, None]).div_(temperature[:, None]).exp_(), draws)


def pick(weights: Tensor, draws: Tensor) -> Tensor:
    """Columns [R], drawn in proportion to ``weights`` [R, width], the width a multiple of 128."""
    blocks = weights.unflatten(1, (-1, _BLOCK))
    cumulative = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    targets = draws * cumulative[:, -1]
    block = _invert(cumulative, targets)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(len(weights), device=weights.device), block].cumsum(dim=-1, dtype=torch.float64)
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

    def rows(self, index: Tensor | slice) -> "Truncation":
        return Truncation(*(field[index] for field in self))


def draw_truncated(x: Tensor, highest: Tensor, cut: Truncation, draws: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """(token ids, their surprise in bits) [R], drawn from what ``cut`` leaves of workspace rows, which stay as they are.

    ``count`` candidates are looked at, which must be at least every top_k. A row without top_k whose NUM_CANDIDATES
    likeliest may not be all that is left is drawn another way; so how a row is drawn, and what, does not depend on
    ``count``. Candidates are in the order of their logits: different ones may have equal weights.
    """
    all_have_top_k = bool((cut.top_k > 0).all())
    logits, ids = top_candidates(x, count if all_have_top_k else max(count, NUM_CANDIDATES))
    weights = _weigh(logits, highest, cut.temperature)
    if all_have_top_k:
        return _draw_kept(truncate(weights, cut, None)[0], ids, draws)
    all_weights = _weigh(x, highest, cut.temperature)
    total = _total(all_weights)
    kept, num_left = truncate(weights, cut, total)
    tokens, surprise = _draw_kept(kept, ids, draws)
    for row in ((cut.top_k == 0) & (num_left >= NUM_CANDIDATES)).nonzero()[:, 0].tolist():
        one = slice(row, row + 1)
        drawn = _draw_from_many(x[row], all_weights[row], cut.rows(one), total[one], draws[one])
        tokens[row], surprise[row] = drawn
    return tokens, surprise


def _draw_from_many(logits: Tensor, weights: Tensor, cut: Truncation, total: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """(token id, surprise) from one row [width], most of which may be left.

    Instead of sorting it, weights are added up by the upper half of their bits, which are in their order. Only the two
    bins that matter are sorted: where ``cut`` ends, and where the draw falls.
    """
    if bool(cut.typical_p < 1):  # needs all of them in another order
        logits, ids = torch.sort(logits, descending=True, stable=True)
        kept, _ = truncate(weights[ids][None], cut, total)
        token, surprise = _draw_kept(kept, ids[None], draw)
        return token[0], surprise[0]
    least = torch.maximum(cut.min_p, total * (cut.max_surprise.double() * -math.log(2)).exp()).clamp_(max=1.0)
    weights = weights.where(weights >= least, 0.0)
    bins = weights.view(torch.int32) >> 16
    mass = torch.zeros(_NUM_BINS, dtype=torch.float64, device=weights.device)
    mass.scatter_add_(0, bins.long(), weights.double())
    cumulative = mass.flip(0).cumsum(0)  # from the heaviest bin on

    def members(place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and weights in the bin at this place, likeliest first, and the weight of all before each."""
        ids = (bins == _NUM_BINS - 1 - place).nonzero()[:, 0]
        ids = ids[torch.sort(logits[ids], descending=True, stable=True).indices]
        inside = weights[ids].double()
        before = cumulative[place - 1] if place else cumulative.new_zeros(())
        return ids, inside, before + inside.cumsum(0) - inside

    left = cumulative[-1]
    if bool(cut.top_p < 1):
        enough = (cut.top_p * total.double())[0]
        place = int(torch.searchsorted(cumulative, enough))
        if place < _NUM_BINS:
            _, inside, before = members(place)
            is_kept = before < enough
            left = (before + inside)[is_kept][-1] if bool(is_kept.any()) else left
    target = draw[0] * left
    ids, inside, before = members(int(torch.searchsorted(cumulative, target, right=True).clamp_(max=_NUM_BINS - 1)))
    at = int((before <= target).sum().clamp_(min=1)) - 1
    return ids[at], -(inside[at] / left).log2()


def _total(weights: Tensor) -> Tensor:
    """[R], added up in an order that depends on nothing but the width."""
    blocks: Tensor = weights.unflatten(1, (-1, _BLOCK))
    return blocks.sum(dim=-1).sum(dim=-1)


def _weigh(logits: Tensor, highest: Tensor, temperature: Tensor) -> Tensor:
    return (logits - highest[:, None]).div_(temperature[:, None]).exp_()


def truncate(weights: Tensor, cut: Truncation, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """The descending ``weights`` [R, K], the likeliest's being 1, with what is cut at 0; and how many [R] are left before
    ``typical_p``: if it is all K of them, there may be more beyond. ``total`` [R] is the weight of a row's whole vocabulary;
    rows with top_k need none."""
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
    kept = kept.masked_fill(is_cut, 0.0)
    num_left = is_cut.shape[1] - is_cut.sum(dim=1)
    if bool((cut.typical_p < 1).any()):
        kept = _keep_typical(kept, cut.typical_p)
    return kept, num_left


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
