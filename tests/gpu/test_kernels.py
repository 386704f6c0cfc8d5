"""Each op of CudaOps on a real GPU, against ReferenceOps or a naive attention in float64 on the CPU."""

import functools
import math

import pytest
import torch
from torch import Tensor

from ferrum_rt.interfaces.tensor import AttentionKind
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.cuda.device import CudaDevice
from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams, draw_in_graph
from ferrum_rt.kernels.reference import ReferenceOps
from ferrum_rt.kernels.sampling import uniform
from tests.fakes import flashinfer as emulation
from tests.kernels.test_attention import naive

BLOCK_SIZE, NUM_PAGES, MAX_PAGES = 16, 256, 48
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = [torch.bfloat16, torch.float16]
REFERENCE = ReferenceOps()

# Groups on the tensor cores and on CUDA cores; head dims that FA3 takes; a window and a soft cap as Gemma has them.
KINDS = [
    AttentionKind(32, 8, 128, 128**-0.5),
    AttentionKind(16, 8, 128, 128**-0.5),
    AttentionKind(4, 2, 64, 64**-0.5),
    AttentionKind(8, 4, 256, 256**-0.5, 100, 50.0),
    AttentionKind(7, 1, 64, 0.2),
]


@functools.cache
def cuda_ops(dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CudaOps:
    return CudaOps("cuda", block_size=BLOCK_SIZE, kv_dtype=kv_dtype or dtype, dtype=dtype)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """On the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(ours: Tensor, expected: Tensor) -> None:
    bound = BOUNDS[ours.dtype]
    torch.testing.assert_close(ours.cpu().double(), expected.double(), atol=bound, rtol=bound)


@pytest.mark.parametrize("rows", [1, 3, 64, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(rows: int, has_bias: bool) -> None:
    """x @ weight.T + bias, whatever the number of rows."""
    dtype, ops = torch.bfloat16, cuda_ops(torch.bfloat16)
    x, weight = random(rows, 512, dtype=dtype, seed=0), random(384, 512, dtype=dtype, seed=1) / 20
    bias = random(384, dtype=dtype, seed=2) if has_bias else None
    out = ops.empty((rows, 384), dtype)
    ops.linear(out, x.cuda(), ops.pack_linear(weight, bias))
    close(out, x.double() @ weight.double().t() + (0 if bias is None else bias.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(dtype: torch.dtype, rows: int, offset: float) -> None:
    """Alone, in place, and after adding to the residual; also with weights near 1."""
    ops, size = cuda_ops(dtype), 1024
    weight = random(size, dtype=dtype, seed=0).float() / (100 if offset else 1) + offset
    x, residual = random(rows, size, dtype=dtype, seed=1), random(rows, size, dtype=dtype, seed=2)
    on_gpu, summed, given = weight.cuda(), residual.cuda(), x.cuda()
    out = ops.empty((rows, size), dtype)
    ops.rms_norm(out, given, on_gpu, 1e-6)
    close(out, norm64(x.double(), weight))
    ops.add_rms_norm(given, summed, given, on_gpu, 1e-6)
    close(given, norm64(residual.double() + x.double(), weight))
    close(summed, residual.double() + x.double())
    ops.rms_norm(summed, summed, on_gpu, 1e-6)
    close(summed, norm64(residual.double() + x.double(), weight))


def norm64(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_qk_norm_rope(dtype: torch.dtype, head_dim: int, offset: float | None) -> None:
    """Strided heads are normed, with a weight that the family may have added 1 to, and turned in place; those beside them
    are left alone."""
    ops, rows, heads = cuda_ops(dtype), 5, 6
    whole = random(rows, heads + 2, head_dim, dtype=dtype, seed=0)
    stored = torch.cat([random(1, head_dim, dtype=dtype, seed=seed).expand(3, -1) for seed in (1, 2)]).float() / 8
    weight = None if offset is None else stored + offset
    positions = torch.tensor([0, 1, 17, 300, 4000])
    angles = torch.arange(4096)[:, None] / 10000.0 ** (torch.arange(head_dim // 2) * 2 / head_dim)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    expected = whole.double()
    REFERENCE.qk_norm_rope(expected[:, :heads], weight, 1e-6, positions, cos_sin)
    ours = whole.cuda()
    ops.qk_norm_rope(ours[:, :heads], None if weight is None else weight.cuda(), 1e-6, positions.cuda(), cos_sin.cuda())
    bound = 4 * BOUNDS[dtype]  # between norm and turn it is rounded once more
    torch.testing.assert_close(ours.cpu().double(), expected, atol=bound, rtol=bound)
    assert torch.equal(ours[:, heads:].cpu(), whole[:, heads:])


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation(dtype: torch.dtype, kind: str) -> None:
    """activation(gate) * up."""
    ops, gate_up = cuda_ops(dtype), random(9, 512, dtype=dtype, seed=0)
    out, expected = ops.empty((9, 256), dtype), torch.empty(9, 256, dtype=torch.float64)
    ops.gated_activation(out, gate_up.cuda(), kind)
    REFERENCE.gated_activation(expected, gate_up.double(), kind)
    close(out, expected)


def test_embed_and_soft_cap() -> None:
    """Rows of the table, scaled as the models that scale were trained; logits that are capped."""
    ops, table = cuda_ops(torch.bfloat16), random(50, 64, dtype=torch.bfloat16, seed=0)
    ids = torch.tensor([3, 49, 0])
    out, expected = ops.empty((3, 64), torch.bfloat16), torch.empty(3, 64, dtype=torch.bfloat16)
    ops.embed(out, ids.cuda(), table.cuda(), 11.3)
    REFERENCE.embed(expected, ids, table, 11.3)
    assert torch.equal(out.cpu(), expected)
    ops.soft_cap(out, 3.0)
    close(out, 3 * torch.tanh(expected.double() / 3))


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("renormalize", [False, True])
def test_mixture_of_experts(rows: int, renormalize: bool) -> None:
    """Each token goes through its experts and no others, and no word of it to the host: it is captured in a graph."""
    dtype, ops, count = torch.bfloat16, cuda_ops(torch.bfloat16), 8
    x, router = random(rows, 64, dtype=dtype, seed=0), random(rows, count, dtype=dtype, seed=1)
    weights = [
        (random(96, 64, dtype=dtype, seed=2 + index) / 8, random(64, 48, dtype=dtype, seed=50 + index) / 7)
        for index in range(count)
    ]
    on_gpu = [(ops.pack_linear(up, None), ops.pack_linear(down, None)) for up, down in weights]
    wide = [(REFERENCE.pack_linear(up.double(), None), REFERENCE.pack_linear(down.double(), None)) for up, down in weights]
    out, given, logits = ops.zeros((rows, 64), dtype), x.cuda(), router.cuda()

    def run() -> None:
        ops.mixture_of_experts(out, given, logits, on_gpu, top_k=2, renormalize=renormalize, kind="silu")

    expected = torch.empty(rows, 64, dtype=torch.float64)
    REFERENCE.mixture_of_experts(expected, x.double(), router, wide, top_k=2, renormalize=renormalize, kind="silu")
    device = CudaDevice()
    torch.cuda.synchronize()
    with device.stream():
        run()
        (graph,) = device.capture(run)
        out.zero_()
        graph.replay()
    device.synchronize()
    close(out, expected)


class Cache:
    """Slots with keys and values in pages in random order, the rest of the pool full of NaN."""

    def __init__(self, ops: CudaOps, lengths: list[int], kind: AttentionKind, dtype: torch.dtype, kv_dtype: torch.dtype):
        self.ops, self.kind, self.dtype = ops, kind, dtype
        self.generator = torch.Generator().manual_seed(len(lengths))
        self.free = torch.randperm(NUM_PAGES, generator=self.generator).tolist()
        self.pages: KvPages = allocate_pages(NUM_PAGES * BLOCK_SIZE, kind.num_kv_heads, kind.head_dim, kv_dtype, "cuda")
        self.pages.data.view(torch.uint8).fill_(0x7F if kv_dtype.itemsize == 1 else 0xFF)
        self.tables = torch.zeros((len(lengths), MAX_PAGES), dtype=torch.int64)
        self.kv: list[Tensor] = []
        for slot, length in enumerate(lengths):
            self.kv.append(torch.zeros((0, 2, kind.num_kv_heads, kind.head_dim), dtype=torch.float64))
            self.grow(slot, length)

    def grow(self, slot: int, count: int) -> None:
        start = len(self.kv[slot])
        for page in range(-(-start // BLOCK_SIZE), -(-(start + count) // BLOCK_SIZE)):
            self.tables[slot, page] = self.free.pop()
        kv = torch.randn((count, 2, self.kind.num_kv_heads, self.kind.head_dim), generator=self.generator).to(self.dtype)
        at = torch.arange(start, start + count)
        rows = self.tables[slot, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        self.ops.append_kv(self.pages, kv.cuda(), rows.cuda())
        self.kv[slot] = torch.cat([self.kv[slot], kv.to(self.pages.data.dtype).double()])

    def queries(self, count: int) -> Tensor:
        """Strided as in the decoder."""
        shape = (count, self.kind.num_heads + 2, self.kind.head_dim)
        return torch.randn(shape, generator=self.generator).to(self.dtype)[:, : self.kind.num_heads]

    def expected(self, q: Tensor, slot: int, start: int) -> Tensor:
        k, v = self.kv[slot][: start + len(q)].unbind(1)
        kind = self.kind
        return naive(q.double(), k, v, start, kind.scale, kind.window, kind.soft_cap)


# Tokens before each sequence's queries, and queries: with the decodes first, as steps have them; with a prompt first; one
# row in all.
MIXED = [
    [(40, 1), (0, 1), (500, 1), (0, 130), (300, 33), (16, 16), (9, 1)],
    [(16, 16), (500, 1), (300, 33), (0, 1), (0, 130), (40, 1)],
    [(7, 1)],
]


def check_mixed(kind: AttentionKind, dtype: torch.dtype, kv_dtype: torch.dtype, parts: list[tuple[int, int]]) -> None:
    ops = cuda_ops(dtype, kv_dtype)
    cache = Cache(ops, [start + count for start, count in parts], kind, dtype, kv_dtype)
    spans, row = [], 0
    for slot, (start, count) in enumerate(parts):
        spans.append(QuerySpan(slot, row, count, start))
        row += count
    q, none = cache.queries(row), torch.zeros(0, dtype=torch.int64)
    batch = TokenBatch(none, none, none, none, spans, cache.tables.cuda(), BLOCK_SIZE)
    out = torch.full((row, kind.num_heads * kind.head_dim), math.nan, dtype=dtype, device="cuda")
    wide = torch.empty_strided(q.shape, ((kind.num_heads + 2) * kind.head_dim, kind.head_dim, 1), dtype=dtype, device="cuda")
    ops.attention(out, wide.copy_(q), cache.pages, ops.plan_attention(batch, [kind]), kind)
    close(out, torch.cat([cache.expected(q[s.row : s.row + s.num_tokens], s.slot, s.start) for s in spans]))


@pytest.mark.parametrize("parts", MIXED, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mixed_steps(kind: AttentionKind, parts: list[tuple[int, int]]) -> None:
    """Decodes and chunks of prompts, in scattered pages among others full of NaN."""
    check_mixed(kind, torch.bfloat16, torch.bfloat16, parts)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_mixed_steps_of_other_types(kv_dtype: torch.dtype) -> None:
    """In float16, and over pages of eight bits."""
    check_mixed(KINDS[2], torch.float16, kv_dtype, MIXED[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_decodes_in_a_graph(kind: AttentionKind) -> None:
    """One captured graph is right at any lengths that are planned before its replay, in whatever order the slots stand."""
    dtype, ops, lengths = torch.bfloat16, cuda_ops(torch.bfloat16), [1, 16, 200, 37]
    cache, device = Cache(ops, lengths, kind, dtype, dtype), CudaDevice()
    tables = torch.zeros_like(cache.tables, device="cuda")
    attention = ops.decode_attention(len(lengths), MAX_PAGES, [kind])
    q = torch.zeros((len(lengths), kind.num_heads, kind.head_dim), dtype=dtype, device="cuda")
    out = torch.full((len(lengths), kind.num_heads * kind.head_dim), math.nan, dtype=dtype, device="cuda")

    def run() -> None:
        ops.attention(out, q, cache.pages, attention.plan, kind)

    torch.cuda.synchronize()
    slots = list(range(len(lengths)))
    with device.stream():
        attention.replan(slots, [1] * len(slots), tables.copy_(cache.tables))
        run()
        (graph,) = device.capture(run)
        for growth in (0, 1, 15, 90):
            for slot in slots:
                cache.grow(slot, growth)
            slots = slots[1:] + slots[:1]
            given = cache.queries(len(slots))
            q.copy_(given)
            num_tokens = [len(cache.kv[slot]) for slot in slots]
            attention.replan(slots, num_tokens, tables.copy_(cache.tables))
            graph.replay()
            device.synchronize()
            rows = enumerate(zip(slots, num_tokens, strict=True))
            close(out, torch.cat([cache.expected(given[row : row + 1], slot, length - 1) for row, (slot, length) in rows]))


def test_a_capture_is_cut() -> None:
    """What one graph leaves the next one reads, and between the two there is room for what is not captured."""
    device = CudaDevice()
    x, between = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")

    def run() -> None:
        doubled = x * 2
        torch.add(doubled, 1, out=between)
        if cuts:
            device.cut()
        x.copy_(between.sqrt() + doubled)

    cuts: list[bool] = []
    torch.cuda.synchronize()
    with device.stream():
        run()
        cuts.append(True)
        first, second = device.capture(run)
        x.fill_(3.0)
        first.replay()
        between.add_(2.0)
        second.replay()
    device.synchronize()
    assert x.tolist() == [9.0] * 1000


def test_pages_are_copied() -> None:
    """Rows of pages go to other rows, and no others change."""
    ops = cuda_ops(torch.bfloat16)
    pages = allocate_pages(64, 2, 64, torch.bfloat16, "cuda")
    before = torch.randn_like(pages.data).to(torch.bfloat16)
    pages.data.copy_(before)
    ops.copy_kv(pages, torch.tensor([3, 4], device="cuda"), torch.tensor([40, 20], device="cuda"))
    expected = before.clone()
    expected[[40, 20]] = before[[3, 4]]
    assert torch.equal(pages.data, expected)


@pytest.mark.parametrize("vocab_size", [300, 4096, 151936])
@pytest.mark.parametrize(
    "fields", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8, "min_p": 0.02}, {"temperature": 0.0}], ids=str
)
def test_draws_equal_those_of_the_emulation(vocab_size: int, fields: dict[str, float]) -> None:
    """Over many rows nearly all tokens are those of the same draw on the CPU: at a bound rounding may decide otherwise."""
    rows = 64 if vocab_size < 10_000 else 12  # the emulation sorts them
    logits = random(rows, vocab_size, dtype=torch.bfloat16, seed=vocab_size) * 3
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **fields}
    types = {"top_k": torch.int32}
    params = [torch.full((rows,), values[name], dtype=types.get(name, torch.float32)) for name in values]
    params.append(uniform(torch.arange(rows), torch.tensor(5), torch.tensor(0)))
    form = DrawForm.GREEDY if fields.get("temperature") == 0 else DrawForm.TRUNCATED if fields else DrawForm.WHOLE
    expected = draw_in_graph(logits, DrawParams(*params), form, emulation)
    logits[1] = math.nan
    ours = draw_in_graph(logits.cuda(), DrawParams(*(x.cuda() for x in params)), form).cpu()
    assert ours[1] == -1
    same = (ours == expected).float()
    same[1] = 1
    assert same.mean() > (0.9 if fields != {"temperature": 0.0} else 0.999)
