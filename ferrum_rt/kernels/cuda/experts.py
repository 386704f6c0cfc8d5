"""Mixture of experts that a CUDA graph can hold: which experts the tokens go to never leaves the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.interfaces.errors import Unsupported
from ferrum_rt.kernels.reference import Linear


class StackedExperts(NamedTuple):
    """gate_up [experts, hidden, 2 * width] and down [experts, width, hidden]."""

    gate_up: Tensor
    down: Tensor


class Routing(NamedTuple):
    """Each token ``top_k`` times, in the order of the experts: ``order`` [N * top_k] says which of the (token, rank) pairs
    stands where, ``ends`` [experts] int32 where each expert's end, ``shares`` [N, top_k] what the router gives them."""

    order: Tensor
    ends: Tensor
    shares: Tensor


def stack_experts(experts: Sequence[tuple[Any, Any]]) -> StackedExperts:
    """The experts' weights in one tensor for each of the two linears, as the grouped matmul wants them. A list of experts is
    made to point there, so that none but those of the layer being copied are held twice. Raises Unsupported."""
    if any(linear.bias is not None for pair in experts for linear in pair):
        raise Unsupported("experts with a bias do not run on CUDA: use the device 'cpu'")
    gate_up, down = (torch.stack([pair[part].weight.t() for pair in experts]).transpose(1, 2) for part in (0, 1))
    if isinstance(experts, list):
        experts[:] = [(Linear(up, None), Linear(back, None)) for up, back in zip(gate_up, down, strict=True)]
    return StackedExperts(gate_up, down)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> Routing:
    """Who goes where, for router_logits [N, experts]. Takes a sort of N * top_k numbers, and no word to the host."""
    shares, chosen = torch.softmax(router_logits.float(), dim=-1).topk(top_k, dim=-1)
    if renormalize:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    sorted_experts, order = chosen.flatten().sort(stable=True)
    experts = torch.arange(router_logits.shape[1], device=router_logits.device)
    return Routing(order, torch.searchsorted(sorted_experts, experts, right=True, out_int32=True), shares)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[rows, out] = x [rows, in] @ weight [experts, in, out], row by row with its expert's. Reads only the experts that have
    rows, so a decode costs what its experts' weights weigh."""
    result: Tensor = F.grouped_mm(x, weight, offs=ends)
    return result


def combine(out: Tensor, results: Tensor, routing: Routing) -> None:
    """out [N, hidden] = each token's results [N * top_k, hidden], weighted. Summed rank by rank: adding rows in place would
    add them in any order."""
    back = torch.empty_like(results)
    back.index_copy_(0, routing.order, results)
    num_tokens, top_k = routing.shares.shape
    out.copy_((back.view(num_tokens, top_k, -1).float() * routing.shares[..., None]).sum(dim=1))
