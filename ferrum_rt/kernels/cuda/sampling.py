"""Drawing tokens inside a CUDA graph: all rows go the same way, and nothing waits for the device.

FlashInfer's kernels say which tokens are in play. Its samplers are not used: they read one seed for the batch and number the
rows, so that a row's draw would depend on where it stands and who stands first.
"""

import enum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.interfaces.sampler import GREEDY_BELOW
from ferrum_rt.kernels.cuda.ops import import_flashinfer
from ferrum_rt.kernels.sampling import argmax, pick

_BLOCK = 128  # what ``pick`` wants


class DrawForm(enum.IntEnum):
    """How much there is to do for the row that wants most. A row is drawn the same in any form that is enough for it."""

    GREEDY = 0
    WHOLE = 1
    """From all tokens that reach ``min_p``."""
    TRUNCATED = 2
    """By ``top_k`` and ``top_p`` too."""


class DrawParams(NamedTuple):
    """How each row is drawn, all [R] on the device. float32: ``temperature`` (0 is greedy), ``top_p`` (1 for all), ``min_p``
    (0 for all). int32: ``top_k`` (0 for all). float64: ``draws``, its number by ``kernels.sampling.uniform``."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    draws: Tensor


def draw_in_graph(logits: Tensor, params: DrawParams, form: DrawForm, flashinfer: Any = None) -> Tensor:
    """Token ids [R] int64, drawn from logits [R, vocabulary], which stay as they are; -1 for rows without a finite maximum.

    The ``top_k`` likeliest are kept, of them the fewest that reach ``top_p``, of them those of at least ``min_p`` times the
    likeliest: transformers' order. Of equal tokens at a bound all are kept. The row's number inverts the distribution in the
    order of ids, so a truncated row may give another token than ``draw_truncated``: a sequence that is drawn here is drawn
    here at every step. Call it once before it is captured, for FlashInfer compiles its kernels and keeps a buffer then.
    """
    highest, likeliest = argmax(logits)
    is_sound = highest.isfinite()
    if form is DrawForm.GREEDY:
        return torch.where(is_sound, likeliest, -1)
    is_greedy = params.temperature <= GREEDY_BELOW
    temperature = torch.where(is_greedy, 1.0, params.temperature)
    scaled = (logits.float() - highest[:, None].float()) / temperature[:, None]
    # What has no order must not reach FlashInfer's searches for a bound.
    scaled = torch.where(is_sound[:, None], scaled, 0.0)
    is_cut = _is_truncated(scaled, params, flashinfer) if form is DrawForm.TRUNCATED else None
    weights = scaled.exp_()  # the likeliest's is 1
    is_small = weights < params.min_p[:, None]
    weights.masked_fill_(is_small if is_cut is None else is_small | is_cut, 0.0)
    drawn = pick(F.pad(weights, (0, -logits.shape[1] % _BLOCK)), params.draws)
    return torch.where(is_sound, torch.where(is_greedy, likeliest, drawn), -1)


def _is_truncated(scaled: Tensor, params: DrawParams, flashinfer: Any) -> Tensor:
    """[R, vocabulary]: what ``top_k`` and ``top_p`` cut. Rows that have neither are left whole, to the bit."""
    flashinfer = import_flashinfer() if flashinfer is None else flashinfer
    vocab_size = scaled.shape[1]
    has_top_k, has_top_p = (params.top_k > 0)[:, None], (params.top_p < 1)[:, None]
    probs = torch.softmax(scaled, dim=-1)
    top_k = torch.where(params.top_k > 0, params.top_k, vocab_size).clamp_(max=vocab_size).to(torch.int32)
    # Its sums are taken in any order, so a row that it does not cut must not hang on them.
    probs = torch.where(has_top_k, flashinfer.top_k_renorm_probs(probs, top_k), probs)
    # A top_p of 1 would cut the tail where sums round up to the whole.
    nucleus = torch.where(has_top_p, flashinfer.top_p_renorm_probs(probs, params.top_p, is_deterministic=True), probs)
    return (nucleus <= 0) & (has_top_k | has_top_p)
