"""What we call of FlashInfer is there, with the parameters that we give, and the emulation that the other tests run on has
the same."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams, draw_in_graph
from tests.fakes import flashinfer as emulation
from tests.fakes.queued_flashinfer import IN_PLACE
from tests.fakes.recorder import Call, Recorder

real = pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
pytestmark = pytest.mark.slow

FUNCTIONS = [*IN_PLACE, "top_k_renorm_probs", "top_p_renorm_probs", "fast_decode_plan"]
METHODS = [
    "BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer",
    *(
        f"{wrapper}.{method}"
        for wrapper in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
        for method in ("__init__", "plan", "run")
    ),
]


def find(module: Any, name: str) -> Callable[..., Any]:
    """A function, or a class's method. The decode's ``plan`` hides its parameters behind **kwargs and hands them on."""
    if module is real and name == "BatchDecodeWithPagedKVCacheWrapper.plan":
        name = "BatchDecodeWithPagedKVCacheWrapper._plan_impl"
    for part in name.split("."):
        module = getattr(module, part)
    function: Callable[..., Any] = module
    return function


def parameters(name: str, module: Any) -> list[tuple[Any, ...]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(find(module, name)).parameters.values()]


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_emulation_has_the_real_parameters(name: str) -> None:
    """The same names, in the same order, of the same kinds, with the same defaults."""
    assert parameters(name, emulation) == parameters(name, real)


def every_call() -> list[Call]:
    """The calls that CudaOps and the sampler make, each kind of them at least once."""
    recorder = Recorder(emulation)
    ops = CudaOps("cpu", block_size=4, kv_dtype=torch.bfloat16, dtype=torch.bfloat16, flashinfer=recorder)
    wide = torch.linspace(0.5, 1.5, 64)
    for weight in (wide.bfloat16().float(), wide.bfloat16().float() / 64 + 1):
        x, residual = torch.ones(3, 64, dtype=torch.bfloat16), torch.ones(3, 64, dtype=torch.bfloat16)
        ops.rms_norm(x, x, weight, 1e-6)
        ops.add_rms_norm(x, residual, x, weight, 1e-6)
    for kind in ("silu", "gelu_tanh"):
        ops.gated_activation(ops.empty((3, 32), x.dtype), x, kind)
    qk = torch.ones(3, 6, 64, dtype=torch.bfloat16)
    ops.qk_norm_rope(qk, wide.expand(6, -1), 1e-6, torch.arange(3), torch.ones(3, 64))
    _attend(ops, qk)
    ones = torch.ones(3)
    draw_in_graph(x, DrawParams(ones, ones.int(), ones, ones, ones.double()), DrawForm.TRUNCATED, recorder)
    return recorder.calls


def _attend(ops: CudaOps, q: Tensor) -> None:
    kinds = [AttentionKind(6, 2, 64, 0.125), AttentionKind(6, 1, 64, 0.125, 3, 5.0)]
    tables, none = torch.arange(3)[:, None], torch.zeros(0, dtype=torch.int64)
    batch = TokenBatch(none, none, none, none, [QuerySpan(0, 0, 1, 0), QuerySpan(1, 1, 2, 0)], tables, 4)
    decode = ops.decode_attention(3, 1, kinds)
    for _ in ("the first time", "and later"):
        decode.replan([0, 1, 2], [1, 1, 1], tables)
    out = ops.empty((3, 6 * 64), q.dtype)
    for plan in (ops.plan_attention(batch, kinds), decode.plan):
        for kind in kinds:
            layer = allocate_pages(12, kind.num_kv_heads, 64, torch.bfloat16, "cpu")
            ops.append_kv(layer, torch.ones(3, 2, kind.num_kv_heads, 64, dtype=torch.bfloat16), torch.tensor([0, 4, 8]))
            ops.attention(out, q, layer, plan, kind)


def test_every_call_binds_to_the_real_signature() -> None:
    """Each function and method of the list is called, and FlashInfer's own signature takes the arguments."""
    calls = every_call()
    assert {call.name for call in calls} == {*FUNCTIONS, *METHODS}
    for call in calls:
        signature = inspect.signature(find(real, call.name))
        signature.bind(*([None] if "." in call.name else []), *call.args, **call.kwargs)


def test_the_decode_plan_hands_its_keywords_on() -> None:
    """``plan`` itself takes our positional arguments as they are: seven of them, and no deprecated ones."""
    for call in every_call():
        if call.name == "BatchDecodeWithPagedKVCacheWrapper.plan":
            bound = inspect.signature(real.BatchDecodeWithPagedKVCacheWrapper.plan).bind(None, *call.args, **call.kwargs)
            assert bound.arguments.get("deprecated_positional_args", ()) == ()
            assert set(bound.arguments["kwargs"]) == set(call.kwargs)
