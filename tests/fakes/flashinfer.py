"""What we call of FlashInfer 0.6.18.post1, in plain torch on the CPU, with its signatures and its demands.

Where the real kernels would read wrong memory without a word (weights of another type, rows that are not dense), this
raises AssertionError. What we do not use raises NotImplementedError. Results are rounded once, at the end, as there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8)


class _Paged:
    """What the two wrappers share: the pages of each sequence as the last plan left them, and the attention over them."""

    _indptr: Tensor
    _indices: Tensor
    _last_page_len: Tensor

    def __init__(self, workspace: Tensor, kv_layout: str, use_cuda_graph: bool, buffers: tuple[Tensor | None, ...]) -> None:
        assert workspace.dtype == torch.uint8
        assert workspace.data_ptr() % 16 == 0
        assert not workspace[: 2**20].any(), "the workspace must be zeroed before its first use"
        assert kv_layout == "NHD"
        self._use_cuda_graph = use_cuda_graph
        self._plan: dict[str, Any] | None = None
        if use_cuda_graph:
            for buffer in buffers:
                if not torch.is_tensor(buffer):
                    raise ValueError("all buffers should be a torch.Tensor in cudagraph mode")
                assert buffer.dtype == torch.int32
            self._indptr, self._indices, self._last_page_len = buffers[:3]  # type: ignore[assignment]
            if len(self._indptr) != len(self._last_page_len) + 1:
                raise ValueError("The size of paged_kv_indptr_buffer should be batch_size + 1")

    def _take_pages(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int) -> None:
        for host in (indptr, last_page_len):
            assert host.device.type == "cpu", "lengths on the device cost a blocking copy"
        for tensor in (indptr, indices, last_page_len):
            assert tensor.dtype == torch.int32, "the kernels index with int32"
            assert tensor.is_contiguous()
        assert indptr[0] == 0
        assert len(indptr) == len(last_page_len) + 1
        assert (indptr[1:] > indptr[:-1]).all(), "a sequence without a page"
        assert indptr[-1] == len(indices)
        assert ((last_page_len > 0) & (last_page_len <= page_size)).all()
        if not self._use_cuda_graph:
            self._indptr, self._indices, self._last_page_len = indptr.clone(), indices.clone(), last_page_len.clone()
            return
        if len(last_page_len) != len(self._last_page_len):
            raise ValueError(f"The batch size should be fixed in cudagraph mode: {len(last_page_len)}")
        if len(indices) > len(self._indices):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        self._indptr.copy_(indptr)
        self._last_page_len.copy_(last_page_len)
        self._indices[: len(indices)].copy_(indices)

    def _planned(self, q: Tensor, paged_kv_cache: Any, out: Tensor | None) -> tuple[dict[str, Any], Tensor, Tensor]:
        assert self._plan is not None, "plan info is not initialized"
        plan = self._plan
        keys, values = paged_kv_cache
        if q.dtype != plan["q_data_type"] or keys.dtype != plan["kv_data_type"]:
            raise ValueError(f"q is {q.dtype} and k is {keys.dtype}; planned were others")
        assert q.shape[1:] == (plan["num_qo_heads"], plan["head_dim"])
        assert keys.shape == values.shape
        assert keys.shape[1:] == (plan["page_size"], plan["num_kv_heads"], plan["head_dim"])
        if keys.stride() != values.stride():
            raise RuntimeError("K/V strides differ")
        assert q.stride()[1:] == (plan["head_dim"], 1)
        assert keys.stride(3) == 1
        if out is None:
            raise NotImplementedError("out")
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.is_contiguous(), "the kernels write dense rows"
        return plan, keys, values

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, plan: dict[str, Any], sequence: int, *, causal: bool
    ) -> Tensor:
        """[n, heads, dim] for one sequence's queries, which stand at its end."""
        pages = self._indices[self._indptr[sequence] : self._indptr[sequence + 1]].long()
        length = (len(pages) - 1) * plan["page_size"] + int(self._last_page_len[sequence])
        shared = plan["num_qo_heads"] // plan["num_kv_heads"]
        k, v = (_gather(cache, pages, length).repeat_interleave(shared, dim=1) for cache in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * plan["sm_scale"]
        if plan["logits_soft_cap"]:
            scores = plan["logits_soft_cap"] * torch.tanh(scores / plan["logits_soft_cap"])
        distance = torch.arange(length - len(q), length)[:, None] - torch.arange(length)
        if causal:
            scores.masked_fill_(distance < 0, -torch.inf)
        if plan["window_left"] >= 0:
            scores.masked_fill_(distance > plan["window_left"], -torch.inf)
        return torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), v)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        for workspace in (float_workspace_buffer, int_workspace_buffer):
            assert workspace.dtype == torch.uint8
            assert workspace.data_ptr() % 16 == 0


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    """One query a sequence."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        _refuse(jit_args=jit_args)
        assert backend in ("auto", "fa2")
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self._use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> None:
        _refuse(
            pos_encoding_mode=pos_encoding_mode != "NONE",
            window_right=window_right,
            o_data_type=o_data_type,
            data_type=data_type,
            rope=rope_scale or rope_theta,
            blocking=not non_blocking,
            block_tables=block_tables,
            seq_lens=seq_lens,
            split=fixed_split_size or disable_split_kv,
            q_len_per_req=q_len_per_req != 1,
        )
        if not self._use_tensor_cores and num_qo_heads // num_kv_heads not in _CUDA_CORE_GROUPS:
            raise RuntimeError(f"Unsupported group_size: {num_qo_heads // num_kv_heads}")
        self._take_pages(indptr, indices, last_page_len, page_size)
        self._plan = _plan(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            window_left,
            logits_soft_cap,
            q_data_type,
            kv_data_type,
            sm_scale,
        )

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Tensor:
        _refuse(scale=q_scale or k_scale or v_scale, lse=lse or return_lse, window_left=window_left, sinks=sinks)
        _refuse(args=args, q_len=q_len_per_req, skip=skip_softmax_threshold_scale_factor, kv_cache_sf=kv_cache_sf)
        plan, keys, values = self._planned(q, paged_kv_cache, out)
        assert out is not None
        if len(q) != len(self._last_page_len):
            raise ValueError(f"{len(q)} queries for {len(self._last_page_len)} sequences")
        rows = [self._attend(q[row : row + 1], keys, values, plan, row, causal=False) for row in range(len(q))]
        return out.copy_(torch.cat(rows))


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Tensor,
    indices: Tensor,
    last_page_len: Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: Any = None,
    kv_data_type: Any = None,
    data_type: Any = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: Tensor | None = None,
) -> None:
    """For graphs: the kernel is that of the last plan, and the caller has filled the wrapper's buffers."""
    _refuse(pos_encoding_mode=pos_encoding_mode != "NONE", rope=rope_scale or rope_theta, data_type=data_type)
    _refuse(split=fixed_split_size or disable_split_kv, q_len_per_req=q_len_per_req != 1, blocking=not non_blocking)
    assert self._plan is not None, "no plan has found the kernel yet"
    assert self._use_cuda_graph
    assert global_override_indptr_cpu is not None, "it would be read from the device"
    assert len(last_page_len) == len(self._last_page_len)
    assert torch.equal(self._indptr, global_override_indptr_cpu)
    assert torch.equal(self._last_page_len, last_page_len)
    assert torch.equal(self._indices[: len(indices)], indices)
    self._take_pages(global_override_indptr_cpu, indices, last_page_len, page_size)
    shape = (num_qo_heads, num_kv_heads, head_dim, page_size, window_left, logits_soft_cap)
    planned = _plan(*shape, q_data_type, kv_data_type, sm_scale)
    assert planned == self._plan, "another kernel"


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    """Any number of queries a sequence."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        _refuse(graph=use_cuda_graph, buffers=qo_indptr_buf or paged_kv_indptr_buf or paged_kv_indices_buf)
        _refuse(buffers=paged_kv_last_page_len_buf or custom_mask_buf or mask_indptr_buf, jit=jit_args or jit_kwargs)
        assert backend == "auto"
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, ())

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        _refuse(head_dim_vo=head_dim_vo, mask=custom_mask or packed_custom_mask, fp16=use_fp16_qk_reduction)
        _refuse(pos_encoding_mode=pos_encoding_mode != "NONE", rope=rope_scale or rope_theta, o_data_type=o_data_type)
        _refuse(blocking=not non_blocking, prefix=prefix_len_ptr, items=token_pos_in_items_ptr or max_item_len_ptr)
        _refuse(items=token_pos_in_items_len, seq_lens_q=seq_lens_q, block_tables=block_tables)
        _refuse(length=max_sequence_kv, split=fixed_split_size or disable_split_kv)
        assert max_token_per_sequence in (None, int(qo_indptr.diff().max()))
        assert qo_indptr.device.type == "cpu"
        assert qo_indptr.dtype == torch.int32
        assert (qo_indptr[1:] > qo_indptr[:-1]).all()
        self._take_pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        assert len(qo_indptr) == len(paged_kv_indptr)
        if seq_lens is not None:
            lengths = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
            assert seq_lens.dtype == torch.int32
            assert torch.equal(seq_lens, lengths), "seq_lens contradicts the pages"
        self._queries, self._causal = qo_indptr.tolist(), causal
        self._plan = _plan(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            page_size,
            window_left,
            logits_soft_cap,
            q_data_type,
            kv_data_type,
            sm_scale,
        )

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor:
        _refuse(scale=q_scale or k_scale or v_scale, lse=lse or return_lse, window_left=window_left, sinks=sinks)
        _refuse(args=args, kv_cache_sf=kv_cache_sf, skip=skip_softmax_threshold_scale_factor)
        _refuse(use_fp16_softmax=use_fp16_softmax, uses_spcompress=uses_spcompress)
        plan, keys, values = self._planned(q, paged_kv_cache, out)
        assert out is not None
        if len(q) != self._queries[-1]:
            raise ValueError(f"q.shape[0] ({len(q)}) does not match qo_indptr[-1] ({self._queries[-1]})")
        rows = [
            self._attend(q[first:end], keys, values, plan, sequence, causal=self._causal)
            for sequence, (first, end) in enumerate(zip(self._queries[:-1], self._queries[1:], strict=True))
        ]
        return out.copy_(torch.cat(rows))


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    return _rms_norm(input, weight, eps, out, 0.0)


def gemma_rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Tensor:
    return _rms_norm(input, weight, eps, out, 1.0)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    _add_rms_norm(input, residual, weight, eps, 0.0)


def gemma_fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    _add_rms_norm(input, residual, weight, eps, 1.0)


def silu_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    return _activate(input, out, F.silu)


def gelu_tanh_and_mul(input: Tensor, out: Tensor | None = None, enable_pdl: bool | None = None) -> Tensor:
    return _activate(input, out, lambda x: F.gelu(x, approximate="tanh"))


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError("cos_sin_cache should be float32")
    _refuse(interleaved=not is_neox)
    assert positions.dtype in (torch.int32, torch.int64)
    assert positions.is_contiguous()
    assert cos_sin_cache.is_contiguous()
    assert head_size in (64, 128, 256), "others take another kernel"
    half = cos_sin_cache.shape[1] // 2
    assert half % 8 == 0, "cosines are loaded eight at a time"
    assert 2 * half <= head_size
    cos, sin = cos_sin_cache[positions][:, None].split(half, dim=-1)
    for x in (query.view(len(query), -1, head_size), key.view(len(key), -1, head_size)):
        assert x.dtype in _HALF
        assert x.shape[1] > 0
        assert x.stride(2) == 1
        first, second = x[..., :half].float(), x[..., half : 2 * half].float()
        x[..., :half], x[..., half : 2 * half] = first * cos - second * sin, second * cos + first * sin


def top_k_renorm_probs(probs: Tensor, top_k: Tensor | int) -> Tensor:
    """Of equal probabilities at the bound all are kept."""
    _check_probs(probs, top_k)
    assert torch.is_tensor(top_k)
    assert not top_k.is_floating_point()
    assert ((top_k > 0) & (top_k <= probs.shape[1])).all()
    least = probs.sort(dim=-1, descending=True).values.gather(1, top_k.long()[:, None] - 1)
    kept = probs.masked_fill(probs < least, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def top_p_renorm_probs(probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False) -> Tensor:
    """Of equal probabilities at the bound all are kept. With 1 the least likely token is lost: so rounding may have it."""
    _check_probs(probs, top_p)
    assert torch.is_tensor(top_p)
    assert top_p.dtype == torch.float32
    ordered = probs.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    num_kept = (before < top_p[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    num_kept = torch.where(top_p[:, None] >= 1, max(1, probs.shape[1] - 1), num_kept)
    least = ordered.gather(1, num_kept - 1)
    kept = probs.masked_fill(probs < least, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def _refuse(**used: Any) -> None:
    for name, value in used.items():
        if value is not None and value is not False and value != 0 and value != ():
            raise NotImplementedError(name)


def _plan(
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    window_left: int,
    logits_soft_cap: float | None,
    q_data_type: Any,
    kv_data_type: Any,
    sm_scale: float | None,
) -> dict[str, Any]:
    assert head_dim in (64, 128, 256)
    assert num_qo_heads % num_kv_heads == 0
    assert q_data_type in _HALF
    assert kv_data_type in (q_data_type, torch.float8_e4m3fn), "no kernel converts between types of 16 bits"
    assert window_left >= -1
    return {
        "num_qo_heads": num_qo_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "window_left": window_left,
        "logits_soft_cap": logits_soft_cap,
        "q_data_type": q_data_type,
        "kv_data_type": kv_data_type,
        "sm_scale": head_dim**-0.5 if sm_scale is None else sm_scale,
    }


def _gather(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """float32 [length, kv heads, dim] of cache [pages, page size, kv heads, dim]."""
    picked = cache.view(torch.uint8)[pages].view(cache.dtype) if cache.itemsize == 1 else cache[pages]
    return picked.flatten(0, 1)[:length].float()


def _rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None, bias: float) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    _check_norm(x, weight)
    assert x.dim() == 2 or (x.dim() == 3 and not bias), "of heads there is only the plain norm"
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.stride(-1) == 1
    wide = x.float()
    return out.copy_(wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * (bias + weight.float()))


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: float) -> None:
    """What is normed is the sum before it is rounded."""
    _check_norm(x, weight)
    assert x.dim() == 2
    assert residual.shape == x.shape
    assert residual.dtype == x.dtype
    assert residual.data_ptr() != x.data_ptr()
    wide = x.float() + residual.float()
    residual.copy_(wide)
    x.copy_(wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * (bias + weight.float()))


def _check_norm(x: Tensor, weight: Tensor) -> None:
    assert x.dtype in _HALF
    assert x.stride(-1) == 1
    assert weight.dim() == 1
    assert weight.is_contiguous()
    assert len(weight) == x.shape[-1]
    assert weight.dtype == x.dtype, "the kernel would read these bytes as the other type"


def _activate(x: Tensor, out: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor:
    assert x.dtype in _HALF
    assert x.is_contiguous(), "the kernel takes no strides"
    half = x.shape[-1] // 2
    if x.shape[-1] * x.itemsize % 16:
        raise ValueError("The pointers must be multiple of 16 bytes.")
    assert half * x.itemsize % 16 == 0, "the second half would be read from an address that is not aligned"
    out = x.new_empty(*x.shape[:-1], half) if out is None else out
    assert out.shape == (*x.shape[:-1], half)
    assert out.is_contiguous()
    assert out.dtype == x.dtype
    return out.copy_(function(x[..., :half].float()) * x[..., half:].float())


def _check_probs(probs: Tensor, bound: Any) -> None:
    assert probs.dtype == torch.float32
    assert probs.dim() == 2
    assert probs.is_contiguous()
    assert probs.isfinite().all(), "a search for a bound among NaN may not end"
    assert bound.shape == probs.shape[:1]
