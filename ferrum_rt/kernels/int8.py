"""What linear layers in int8 compute, in plain torch: symmetric, with a scale for each row of x and of the weight."""

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST = 127
_EXACT = 2**24 // _LARGEST**2  # so many products add up in float32 without rounding


class Int8Linear(NamedTuple):
    """A weight [out, in] in int8, and in float32 its rows' scales [out] and the bias [out]."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None


def pack_int8(weight: Tensor, bias: Tensor | None) -> Int8Linear:
    """Round a weight [out, in]."""
    rounded, scales = quantize(weight)
    return Int8Linear(rounded, scales.flatten(), None if bias is None else bias.float())


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] in int8 from -127 to 127, and the scales [rows, 1] to multiply it with: NaN for a row that holds NaN or
    infinity."""
    x = x.float()
    scales = x.abs().amax(dim=1, keepdim=True).div_(_LARGEST)
    # Below the normal numbers the inverse is infinite; such a row is as good as 0.
    inverse = torch.where(scales >= torch.finfo(torch.float32).tiny, 1.0 / scales, 0.0)
    rounded = (x * inverse).round_().clamp_(-_LARGEST, _LARGEST).nan_to_num_(0.0)
    return rounded.to(torch.int8), scales.where(scales.isfinite(), torch.nan)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Exactly x [N, in] @ weight.T [in, out] of int8, in int32."""
    total = torch.zeros((len(x), len(weight)), dtype=torch.int32, device=x.device)
    for x_part, weight_part in zip(x.split(_EXACT, dim=1), weight.split(_EXACT, dim=1), strict=True):
        total += torch.mm(x_part.float(), weight_part.float().t()).to(torch.int32)
    return total
