"""Drawing tokens inside a CUDA graph: every row goes the whole way, and nothing waits for the device.

FlashInfer's kernels say which tokens are in play. Its samplers are not used: they read one seed for the batch and number the
rows, so that a row's draw would depend on where it stands and who stands first.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.interfaces.sampler import GREEDY_BELOW
from ferrum_rt.kernels.cuda.ops import import_flashinfer
from ferrum_rt.kernels.sampling import argmax, pick, uniform

_BLOCK = 128  # what ``pick`` wants


class DrawParams(NamedTuple):
    """How each row is drawn, all [R] on the device. float32: ``temperature`` (0 is greedy), ``top_p`` (1 for all), ``min_p``
    (0 for all). int32: ``top_k`` (0 for all). int64: ``seeds``, the ``positions`` that the tokens will stand at, and
    ``samples``, the outputs' indexes."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    samples: Tensor


def draw_in_graph(logits: Tensor, params: DrawParams, flashinfer: Any = None) -> Tensor:
    """Token ids [R] int64, drawn from logits [R, vocabulary], which stay as they are; -1 for rows without a finite maximum.

    The ``top_k`` likeliest are kept, of them the fewest that reach ``top_p``, of them those of at least ``min_p`` times the
    likeliest: transformers' order. Of equal tokens at a bound all are kept. The uniform number is the one of
    ``kernels.sampling``, of (seed, position, sample) alone; it inverts the distribution in the order of ids, so a truncated
    row may give another token than ``draw_truncated``: a sequence that is drawn here is drawn here at every step. Call it
    once before it is captured, for FlashInfer compiles its kernels and keeps a buffer then.
    """
    flashinfer = import_flashinfer() if flashinfer is None else flashinfer
    highest, likeliest = argmax(logits)
    is_sound = highest.isfinite()
    is_greedy = params.temperature <= GREEDY_BELOW
    temperature = torch.where(is_greedy, 1.0, params.temperature)
    scaled = (logits.float() - highest[:, None].float()) / temperature[:, None]
    # What has no order must not reach FlashInfer's searches for a bound.
    scaled = torch.where(is_sound[:, None], scaled, 0.0)

    vocab_size = logits.shape[1]
    top_k = torch.where(params.top_k > 0, params.top_k, vocab_size).clamp_(max=vocab_size).to(torch.int32)
    probs = flashinfer.top_k_renorm_probs(torch.softmax(scaled, dim=-1), top_k)
    nucleus = flashinfer.top_p_renorm_probs(probs, params.top_p, is_deterministic=True)
    # A top_p of 1 would cut the tail where sums round up to the whole.
    nucleus = torch.where(params.top_p[:, None] < 1, nucleus, probs)
    weights = scaled.exp_()  # the likeliest's is 1
    is_cut = (nucleus <= 0) | (weights < params.min_p[:, None])
    weights = F.pad(weights.masked_fill_(is_cut, 0.0), (0, -vocab_size % _BLOCK))
    drawn = pick(weights, uniform(params.seeds, params.positions, params.samples))
    return torch.where(is_sound, torch.where(is_greedy, likeliest, drawn), -1)
