"""Each op of CudaOps, on the emulation of FlashInfer, against ReferenceOps in float64."""

import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ferrum_rt.interfaces.errors import DeviceError, Unsupported
from ferrum_rt.kernels.batch import KvPages, allocate_pages
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.cuda.norms import head_runs, narrow
from ferrum_rt.kernels.reference import ReferenceOps
from tests.fakes import flashinfer as emulation
from tests.fakes.recorder import Recorder

# A few units in the last place.
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
REFERENCE = ReferenceOps()

dtypes = st.sampled_from([torch.bfloat16, torch.float16])
seeds = st.integers(0, 1000)


@functools.cache  # zeroing the workspace takes longer than the tests
def cuda_ops(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CudaOps:
    return CudaOps("cpu", block_size=4, kv_dtype=kv_dtype or dtype, dtype=dtype, flashinfer=emulation)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, expected: Tensor) -> None:
    bound = BOUNDS[ours.dtype]
    torch.testing.assert_close(ours.double(), expected.double(), atol=bound, rtol=bound)


def norm64(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(dtype=dtypes, rows=st.integers(1, 9), has_bias=st.booleans(), seed=seeds)
def test_linear(dtype: torch.dtype, rows: int, has_bias: bool, seed: int) -> None:
    """x @ weight.T + bias, whatever the number of rows."""
    ops = cuda_ops(dtype)
    x, weight = random(rows, 96, dtype=dtype, seed=seed), random(80, 96, dtype=dtype, seed=seed + 1) / 10
    bias = random(80, dtype=dtype, seed=seed + 2) if has_bias else None
    out = ops.empty((rows, 80), dtype)
    ops.linear(out, x, ops.pack_linear(weight, bias))
    expected = torch.empty(rows, 80, dtype=torch.float64)
    wide = REFERENCE.pack_linear(weight.double(), None if bias is None else bias.double())
    REFERENCE.linear(expected, x.double(), wide)
    close(out, expected)


@settings(max_examples=25, deadline=None)
@given(
    dtype=dtypes, rows=st.integers(1, 9), size=st.sampled_from([64, 96, 256]), offset=st.sampled_from([0.0, 1.0]), seed=seeds
)
def test_norms(dtype: torch.dtype, rows: int, size: int, offset: float, seed: int) -> None:
    """Alone, in place, and after adding to the residual, apart and in place; also with weights near 1, of which the
    activations' type would keep few bits."""
    ops = cuda_ops(dtype)
    weight = (random(size, dtype=dtype, seed=seed).float() / (100 if offset else 1)) + offset
    x, residual = random(rows, size, dtype=dtype, seed=seed + 1), random(rows, size, dtype=dtype, seed=seed + 2)
    out = ops.empty((rows, size), dtype)
    ops.rms_norm(out, x, weight, 1e-6)
    close(out, norm64(x, weight))

    for in_place in (False, True):
        given_x, summed = x.clone(), residual.clone()
        target = given_x if in_place else out
        ops.add_rms_norm(target, summed, given_x, weight, 1e-6)
        assert torch.equal(summed, residual + x)
        close(target, norm64(residual.double() + x.double(), weight))

    expected = norm64(x, weight)
    ops.rms_norm(x, x, weight, 1e-6)
    close(x, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norm_weights_lose_nothing(dtype: torch.dtype) -> None:
    """A checkpoint's weight is kept exactly; where the family adds 1 to it, without the 1, which the kernel adds."""
    stored = (random(256, dtype=torch.float32, seed=0) / 50).bfloat16().float()
    plain, offset = narrow(stored, dtype, "cpu"), narrow(stored + 1, dtype, "cpu")
    assert (plain.is_offset, offset.is_offset) == (False, True)
    assert torch.equal(plain.weight.float(), stored.to(dtype).float())
    torch.testing.assert_close(offset.weight.float() + 1, stored + 1, atol=2e-7, rtol=0)


def test_a_weight_is_converted_once() -> None:
    """The second norm with a weight gives FlashInfer the tensor of the first, which a captured graph has to find again."""
    recorder = Recorder(emulation)
    ops = CudaOps("cpu", block_size=4, kv_dtype=torch.bfloat16, dtype=torch.bfloat16, flashinfer=recorder)
    x, weights = torch.ones(2, 64, dtype=torch.bfloat16), [torch.full((64,), 2.0), torch.full((64,), 3.0)]
    for weight in (*weights, *weights):
        ops.rms_norm(x, x, weight, 1e-6)
    given = [call.args[1].data_ptr() for call in recorder.calls]
    assert given[:2] == given[2:]
    assert given[0] != given[1]


@settings(max_examples=40, deadline=None)
@given(
    dtype=dtypes,
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (3, 3)]),
    dims=st.sampled_from([(64, 64), (64, 32), (128, 128), (256, 128), (128, 16)]),
    positions=st.lists(st.integers(0, 99), min_size=1, max_size=6),
    offset=st.sampled_from([None, 0.0, 1.0]),
    seed=seeds,
)
def test_queries_and_keys_are_normed_and_rotated(
    dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], positions: list[int], offset: float | None, seed: int
) -> None:
    """The queries' heads and the keys', each with its weight, to which the family may add 1; halves paired; dimensions past
    the rotary ones and the values beside them stay as they are."""
    ops = cuda_ops(dtype)
    (queries, keys), (dim, rotary) = heads, dims
    qkv = random(len(positions), queries + 2 * keys, dim, dtype=dtype, seed=seed)
    norms = [(random(dim, dtype=torch.float32, seed=seed + i) / 10).to(dtype).float() + (offset or 0) for i in (1, 2)]
    weight = None if offset is None else torch.cat([norms[0].expand(queries, -1), norms[1].expand(keys, -1)])
    angles = torch.outer(torch.arange(100).double(), torch.logspace(0, -3, rotary // 2).double())

    expected = qkv.double()
    if weight is not None:
        expected[:, : queries + keys] = norm64(expected[:, : queries + keys], weight)
    cos, sin = angles[positions].cos()[:, None], angles[positions].sin()[:, None]
    first, second = expected[:, : queries + keys].clone()[..., :rotary].chunk(2, dim=-1)
    expected[:, : queries + keys, : rotary // 2] = first * cos - second * sin
    expected[:, : queries + keys, rotary // 2 : rotary] = second * cos + first * sin
    values = qkv[:, queries + keys :].clone()

    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    ops.qk_norm_rope(qkv[:, : queries + keys], weight, 1e-6, torch.tensor(positions), table)
    close(qkv, expected)
    assert torch.equal(qkv[:, queries + keys :], values)


def test_heads_are_grouped_by_weight() -> None:
    """Neighbours with the same weight are one run, in order, and every head is in one; weights with the family's 1 in them
    are left to a norm that does not narrow them."""
    rows = torch.stack([torch.full((64,), float(value)) for value in (2, 2, 3, 3, 3, 2)])

    def found(rows: Tensor) -> list[tuple[int, int, float]] | None:
        runs = head_runs(rows, torch.bfloat16, "cpu")
        return None if runs is None else [(first, end, float(weight[0])) for first, end, weight in runs]

    assert found(rows) == [(0, 2, 2.0), (2, 5, 3.0), (5, 6, 2.0)]
    assert found(rows[:1]) == [(0, 1, 2.0)]
    assert found(torch.cat([rows, rows[:1] / 1000 + 1])) is None


@settings(max_examples=20, deadline=None)
@given(dtype=dtypes, rows=st.integers(1, 5), size=st.sampled_from([8, 24, 96]), kind=st.sampled_from(["silu", "gelu_tanh"]))
def test_gated_activation(dtype: torch.dtype, rows: int, size: int, kind: str) -> None:
    """act(gate) * up, for both activations."""
    gate_up = random(rows, 2 * size, dtype=dtype, seed=size)
    out, expected = torch.empty(rows, size, dtype=dtype), torch.empty(rows, size, dtype=torch.float64)
    cuda_ops(dtype).gated_activation(out, gate_up, kind)
    REFERENCE.gated_activation(expected, gate_up.double(), kind)
    close(out, expected)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), num_experts=st.integers(2, 6), top_k=st.integers(1, 2), renormalize=st.booleans(), seed=seeds)
def test_mixture_of_experts(rows: int, num_experts: int, top_k: int, renormalize: bool, seed: int) -> None:
    """Each token gets its best experts' outputs, weighted by the router; experts without a token are no trouble."""
    ops, dtype = cuda_ops(torch.bfloat16), torch.bfloat16
    x, router = random(rows, 32, dtype=dtype, seed=seed), random(rows, num_experts, dtype=dtype, seed=seed + 1)
    pairs = [
        (random(48, 32, dtype=dtype, seed=seed + 2 + i) / 4, random(32, 24, dtype=dtype, seed=seed + 99 + i) / 4)
        for i in range(num_experts)
    ]
    experts = [tuple(ops.pack_linear(weight, None) for weight in pair) for pair in pairs]
    wide = [tuple(REFERENCE.pack_linear(weight.double(), None) for weight in pair) for pair in pairs]
    out, expected = torch.empty(rows, 32, dtype=dtype), torch.empty(rows, 32, dtype=torch.float64)
    for _ in range(2):  # also once the experts are stacked
        ops.mixture_of_experts(out, x, router, experts, top_k=top_k, renormalize=renormalize, kind="silu")
    REFERENCE.mixture_of_experts(
        expected, x.double(), router.double(), wide, top_k=top_k, renormalize=renormalize, kind="silu"
    )
    close(out, expected)


def test_experts_are_held_once() -> None:
    """After the first use, the list that the model holds points into the stack."""
    ops, dtype = cuda_ops(torch.bfloat16), torch.bfloat16
    experts = [
        (ops.pack_linear(torch.ones(32, 16, dtype=dtype), None), ops.pack_linear(torch.ones(16, 16, dtype=dtype), None))
        for _ in range(3)
    ]
    x, router = torch.ones(2, 16, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    ops.mixture_of_experts(torch.empty_like(x), x, router, experts, top_k=1, renormalize=True, kind="silu")
    for part in (0, 1):
        assert len({pair[part].weight.untyped_storage().data_ptr() for pair in experts}) == 1


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    dtype=dtypes,
    is_fp8=st.booleans(),
    slots=st.lists(st.integers(0, 31), min_size=1, max_size=8, unique=True),
    scale=st.sampled_from([1.0, 1000.0]),
    seed=seeds,
)
def test_append_and_copy_kv(dtype: torch.dtype, is_fp8: bool, slots: list[int], scale: float, seed: int) -> None:
    """Rows hold what the reference puts there, bit for bit, too large values clamped; other rows stay as they are."""
    kv_dtype = torch.float8_e4m3fn if is_fp8 else dtype
    ops = cuda_ops(dtype, kv_dtype)
    ours, theirs = (allocate_pages(32, 2, 64, kv_dtype, "cpu") for _ in range(2))
    for pages in (ours, theirs):
        pages.data.view(torch.uint8).fill_(7)
    heads = random(len(slots), 6, 64, dtype=dtype, seed=seed) * scale
    kv = heads[:, 2:].view(len(slots), 2, 2, 64)  # beside the queries, as in the decoder
    at, back = torch.tensor(slots), torch.tensor(slots).flip(0)
    for backend, pages in ((ops, ours), (REFERENCE, theirs)):
        backend.append_kv(pages, kv, at)
        backend.copy_kv(pages, at[:1], back[:1])
    assert torch.equal(bits(ours), bits(theirs))
    assert ours.data.float().isfinite().all()


def bits(pages: KvPages) -> Tensor:
    return pages.data.view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_embed_gather_and_soft_cap(dtype: torch.dtype) -> None:
    """Rows are looked up and scaled, picked, and capped."""
    ops, table, ids = cuda_ops(dtype), random(11, 8, dtype=dtype, seed=0), torch.tensor([3, 0, 10, 3])
    out, picked = ops.empty((4, 8), dtype), ops.empty((2, 8), dtype)
    ops.embed(out, ids, table, 2.0)
    assert torch.equal(out, table[ids] * 2)
    ops.gather_rows(picked, out, torch.tensor([2, 0]))
    assert torch.equal(picked, out[[2, 0]])
    expected = 1.5 * torch.tanh(picked.double() / 1.5)
    ops.soft_cap(picked, 1.5)
    close(picked, expected)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "named"),
    [
        (torch.float32, torch.float32, "dtype"),
        (torch.bfloat16, torch.int8, "kv_cache.dtype"),
        (torch.bfloat16, torch.float16, "kv_cache.dtype"),
        (torch.float16, torch.float32, "kv_cache.dtype"),
    ],
)
def test_types_without_a_kernel_are_refused(dtype: torch.dtype, kv_dtype: torch.dtype, named: str) -> None:
    """At once, with the field and what to use instead."""
    with pytest.raises(Unsupported, match=rf"^{named} torch\.\w+: .*(bfloat16|fp8)"):
        cuda_ops(dtype, kv_dtype)


def test_shapes_without_a_kernel_are_refused() -> None:
    """Rotary dimensions that are no multiple of 16, rows that are no multiple of 8, experts in float16 or with a bias, and
    int8."""
    ops, dtype = cuda_ops(torch.float16), torch.float16
    with pytest.raises(Unsupported, match=r"int8: .* use the device 'cpu'"):
        ops.pack_linear(torch.ones(16, 8, dtype=dtype), None, is_int8=True)
    with pytest.raises(Unsupported, match="rotary dimensions 24"):
        ops.qk_norm_rope(torch.ones(1, 2, 64, dtype=dtype), None, 1e-6, torch.zeros(1, dtype=torch.int64), torch.ones(9, 24))
    with pytest.raises(Unsupported, match="intermediate_size 12"):
        ops.gated_activation(torch.ones(1, 12, dtype=dtype), torch.ones(1, 24, dtype=dtype), "silu")
    for dtype, has_bias, words in ((torch.float16, False, "bfloat16"), (torch.bfloat16, True, "bias")):
        ops, bias = cuda_ops(dtype), torch.ones(16, dtype=dtype)
        packed = ops.pack_linear(torch.ones(16, 8, dtype=dtype), bias if has_bias else None)
        x = torch.ones(1, 8, dtype=dtype)
        with pytest.raises(Unsupported, match=words):
            ops.mixture_of_experts(x, x, x, [(packed, packed)], top_k=1, renormalize=True, kind="silu")


@pytest.mark.slow
def test_flashinfer_is_imported_late_and_missed_politely() -> None:
    """Importing the package loads no FlashInfer; where there is none, the error says what to install."""
    code = """
import sys
sys.modules["flashinfer"] = None
import ferrum_rt.kernels.cuda.sampling
from ferrum_rt.kernels.cuda.ops import import_flashinfer
try:
    import_flashinfer()
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{DeviceError.__name__} device 'cuda' needs FlashInfer: pip install 'ferrum-rt[cuda]'")
