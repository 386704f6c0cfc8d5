"""Each TensorOps against float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ferrum_rt.kernels.batch import allocate_pages
from ferrum_rt.kernels.cpu import NativeOps, TorchCpuOps, load_kernels
from ferrum_rt.kernels.reference import ReferenceOps

BACKENDS = [ReferenceOps, TorchCpuOps, NativeOps]
# The usual bounds: a few units in the last place of the type that the result is rounded to.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

backends = pytest.mark.parametrize("ops", BACKENDS, ids=lambda backend: backend.__name__, indirect=True)
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@pytest.fixture
def ops(request: pytest.FixtureRequest) -> Iterator[ReferenceOps]:
    if request.param is not NativeOps:
        yield request.param()
        return
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    native = NativeOps(kernels, 2)
    yield native
    native.close()


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, expected: Tensor) -> None:
    bound = BOUNDS[ours.dtype]
    torch.testing.assert_close(ours.double(), expected, atol=bound, rtol=bound)


@backends
@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 65])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(ops: ReferenceOps, dtype: torch.dtype, rows: int, has_bias: bool) -> None:
    """x @ weight.T + bias, for few rows and many."""
    x, weight = random(rows, 96, dtype=dtype), random(80, 96, dtype=dtype, seed=1) / 10
    bias = random(80, dtype=dtype, seed=2) if has_bias else None
    out = ops.empty((rows, 80), dtype)
    ops.linear(out, x, ops.pack_linear(weight, bias))
    close(out, F.linear(x.double(), weight.double(), None if bias is None else bias.double()))


@backends
@dtypes
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 96, 80), (3, 1, 40), (16, 3000, 33), (65, 7, 1), (0, 96, 80)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_in_int8(ops: ReferenceOps, dtype: torch.dtype, rows: int, inner: int, outer: int, has_bias: bool) -> None:
    """Rows of x and of the weight are rounded by a scale of their own, and the sums are exact, also of more products
    near the largest than float32 holds the sum of."""
    x, weight = random(rows, inner, dtype=dtype), random(outer, inner, dtype=dtype, seed=1)
    x[::2], weight[::3] = x[::2].clamp(0.9, 1.0), weight[::3].clamp(0.9, 1.0)
    bias = random(outer, dtype=dtype, seed=2) if has_bias else None
    out = ops.empty((rows, outer), dtype)
    ops.linear(out, x, ops.pack_linear(weight, bias, is_int8=True))
    x_scale, weight_scale = (part.float().abs().amax(1, keepdim=True) / 127 for part in (x, weight))
    total = (x * (1 / x_scale)).round().double() @ (weight * (1 / weight_scale)).round().double().T
    expected = total.float() * (weight_scale.T * x_scale)
    assert torch.equal(out, (expected if bias is None else expected + bias).to(dtype))


@backends
def test_int8_rows_that_have_no_scale(ops: ReferenceOps) -> None:
    """A row with NaN or infinity in it is NaN, one of zeros or of numbers too small to scale is 0, and no other differs."""
    x, weight = random(6, 64, dtype=torch.float32), random(40, 64, dtype=torch.float32, seed=1)
    packed = ops.pack_linear(weight, None, is_int8=True)
    sound, out = ops.empty((6, 40), torch.float32), ops.empty((6, 40), torch.float32)
    ops.linear(sound, x, packed)
    x[0, 3], x[1, 5], x[2], x[3] = torch.nan, -torch.inf, 0.0, 1e-38
    ops.linear(out, x, packed)
    assert bool(out[:2].isnan().all())
    assert bool((out[2:4] == 0).all())
    assert torch.equal(out[4:], sound[4:])


@backends
@dtypes
def test_norms(ops: ReferenceOps, dtype: torch.dtype) -> None:
    """RMS norm alone, in place, and after adding to the residual."""
    x, residual, weight = random(5, 64, dtype=dtype), random(5, 64, dtype=dtype, seed=1), random(64, dtype=torch.float32)

    def norm(value: Tensor) -> Tensor:
        return value * (value.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    out = ops.empty((5, 64), dtype)
    ops.rms_norm(out, x, weight, 1e-6)
    close(out, norm(x.double()))
    added = residual + x
    ops.add_rms_norm(out, residual, x, weight, 1e-6)
    assert torch.equal(residual, added)
    close(out, norm(added.double()))
    summed, in_place = residual + x, x.clone()
    ops.add_rms_norm(in_place, residual, in_place, weight, 1e-6)
    assert torch.equal(residual, summed)
    close(in_place, norm(summed.double()))
    expected = norm(x.double())
    ops.rms_norm(x, x, weight, 1e-6)
    close(x, expected)


@backends
@dtypes
@pytest.mark.parametrize("has_norm", [False, True])
def test_queries_and_keys_are_normed_and_rotated(ops: ReferenceOps, dtype: torch.dtype, has_norm: bool) -> None:
    """Each head is normed with its own weight; then pairs (i, i + half) are turned by their angle, and dimensions past the
    rotary ones left as they are. The values beside them in memory are not touched."""
    qkv = random(6, 5 * 10, dtype=dtype).view(6, 5, 10)
    weight = random(4, 10, dtype=torch.float32, seed=1) if has_norm else None
    angles = torch.outer(torch.arange(9).double(), torch.tensor([1.0, 0.3, 0.1, 0.03]).double())
    positions = torch.tensor([0, 1, 2, 5, 7, 8])
    expected = qkv.double().clone()
    if weight is not None:
        wide = expected[:, :4]
        expected[:, :4] = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    cos, sin = angles[positions].cos()[:, None], angles[positions].sin()[:, None]
    first, second = expected[:, :4, :4].clone(), expected[:, :4, 4:8].clone()
    expected[:, :4, :4], expected[:, :4, 4:8] = first * cos - second * sin, second * cos + first * sin
    ops.qk_norm_rope(qkv[:, :4], weight, 1e-6, positions, torch.cat([angles.cos(), angles.sin()], dim=-1).float())
    close(qkv, expected)


@backends
@dtypes
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation(ops: ReferenceOps, dtype: torch.dtype, kind: str) -> None:
    """act(gate) * up, for both activations."""
    gate_up = random(5, 64, dtype=dtype)
    out = ops.empty((5, 32), dtype)
    ops.gated_activation(out, gate_up, kind)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(out, (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up)


@backends
@pytest.mark.parametrize("renormalize", [False, True])
def test_mixture_of_experts(ops: ReferenceOps, renormalize: bool) -> None:
    """Each token gets its best experts' outputs, weighted by the router."""
    x, router = random(7, 16, dtype=torch.float32), random(7, 4, dtype=torch.float32, seed=1)
    weights = [
        (random(24, 16, dtype=torch.float32, seed=2 + i), random(16, 12, dtype=torch.float32, seed=9 + i)) for i in range(4)
    ]
    experts = [(ops.pack_linear(up, None), ops.pack_linear(down, None)) for up, down in weights]
    out = ops.empty((7, 16), torch.float32)
    ops.mixture_of_experts(out, x, router, experts, top_k=2, renormalize=renormalize, kind="silu")
    expected = torch.zeros(7, 16, dtype=torch.float64)
    for row in range(7):
        shares = torch.softmax(router[row].double(), dim=-1)
        best = shares.topk(2).indices.tolist()
        total = sum(shares[best]) if renormalize else 1.0
        for index in best:
            up, down = weights[index]
            gate, value = (x[row].double() @ up.double().T).chunk(2)
            expected[row] += shares[index] / total * ((F.silu(gate) * value) @ down.double().T)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@backends
@dtypes
def test_embed_gather_and_soft_cap(ops: ReferenceOps, dtype: torch.dtype) -> None:
    """Rows are looked up and scaled, picked, and capped."""
    table, ids = random(11, 8, dtype=dtype), torch.tensor([3, 0, 10, 3])
    out = ops.empty((4, 8), dtype)
    ops.embed(out, ids, table, 2.0)
    assert torch.equal(out, table[ids] * 2)
    picked = ops.empty((2, 8), dtype)
    ops.gather_rows(picked, out, torch.tensor([2, 0]))
    assert torch.equal(picked, out[[2, 0]])
    expected = 1.5 * torch.tanh(picked.double() / 1.5)
    ops.soft_cap(picked, 1.5)
    close(picked, expected)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_copy_kv(ops: ReferenceOps, dtype: torch.dtype) -> None:
    """The target rows hold bit for bit what the sources hold, scales too, and no other row changes."""
    layer = allocate_pages(8, 2, 4, dtype, "cpu")
    ops.append_kv(layer, random(8, 2, 2, 4, dtype=torch.float32), torch.arange(8))
    before = layer.data.view(torch.uint8).clone(), None if layer.scales is None else layer.scales.clone()
    ops.copy_kv(layer, torch.tensor([1, 6]), torch.tensor([4, 3]))
    rows = torch.tensor([0, 1, 2, 6, 1, 5, 6, 7])
    assert torch.equal(layer.data.view(torch.uint8), before[0][rows])
    if layer.scales is not None:
        assert before[1] is not None
        assert torch.equal(layer.scales, before[1][rows])
    else:
        assert dtype != torch.int8
