"""Paged attention through FlashInfer (arXiv:2501.01005): plans for steps of any shape, and for decodes in CUDA graphs.

FlashInfer wants to know where everybody's pages are before the layers run; what it works out from that (how the work is cut
up) is the same in every layer of a kind. Lengths stay on the host and page numbers on the device, so planning waits for
nothing. Host tensors are pinned: a copy from other memory may wait for the stream.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferrum_rt.interfaces.errors import Unsupported
from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 384 * 2**20
"""For partial results of split sequences: without graphs 2 * SMs * heads per group * queries per tile * head dim * 4 at
most, with graphs as ``_check_workspace`` has it."""
_PLAN_BYTES = 8 * 2**20  # as much as a wrapper allocates of its own accord
_TENSOR_CORES_FROM = 4
_TILES = (16, 64, 128)  # rows of queries and heads that share keys, in FA2
_PROCESSORS = 132  # an H100's, where there is no device to ask


class AttentionSetup(NamedTuple):
    """What all plans of one CudaOps share. ``workspace`` [bytes] is used by one kernel at a time, on one stream."""

    flashinfer: Any
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    workspace: Tensor


class PageList(NamedTuple):
    """B sequences' pages one after the other: those of sequence i are ``indices[indptr[i]:indptr[i + 1]]``, its last one has
    ``last_page_len[i]`` tokens, all of them ``num_tokens[i]``. All int32, [B + 1] or [B]; ``indices`` on the device."""

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    num_tokens: Tensor


def list_pages(slots: Sequence[int], num_tokens: Sequence[int], block_tables: Tensor, block_size: int) -> PageList:
    """The pages of the first ``num_tokens[i]`` tokens of each slot, without waiting for the device: where to look in
    ``block_tables`` [slots, pages] is worked out on the host, and one gather looks there. The host does it in numpy: with
    torch 64 sequences of 128 pages took 190 µs, and take 42."""
    lengths = np.array(num_tokens, dtype=np.int32)
    num_pages = (lengths + (block_size - 1)) // block_size
    indptr = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(num_pages, out=indptr[1:])
    first = np.array(slots, dtype=np.int64) * block_tables.shape[1] - indptr[:-1]
    at = np.repeat(first, num_pages) + np.arange(indptr[-1])
    device = block_tables.device
    indices = block_tables.view(-1).index_select(0, _pinned(at, device).to(device, non_blocking=True))
    return PageList(
        _pinned(indptr, device),
        indices.to(torch.int32),
        _pinned((lengths - 1) % block_size + 1, device),
        _pinned(lengths, device),
    )


def _pinned(values: NDArray[Any], device: torch.device) -> Tensor:
    """torch gives pinned memory to the next taker only after the copies from it have been made."""
    x = torch.from_numpy(values)
    return x.pin_memory() if device.type == "cuda" else x


def check_kind(kind: AttentionKind) -> None:
    """Raise Unsupported if FlashInfer has no kernel for layers that attend like this."""
    if kind.head_dim not in HEAD_DIMS:
        raise Unsupported(f"head_dim {kind.head_dim}: attention on CUDA takes 64, 128 or 256; use the device 'cpu'")


class PlannedRows(NamedTuple):
    """A planned wrapper, and the rows that it is planned for: from ``first`` to before ``end``."""

    wrapper: Any
    first: int
    end: int


Plan = dict[AttentionKind, list[PlannedRows]]


class EagerAttention:
    """Attention of steps of any shape: sequences with one query, and behind them chunks of prompts. What comes first takes
    the kernels for decodes: those for prompts have tiles of 128 queries. One plan is valid at a time."""

    def __init__(self, setup: AttentionSetup) -> None:
        self._setup = setup
        self._decodes: dict[AttentionKind, Any] = {}
        self._prompts: dict[AttentionKind, Any] = {}
        self._planned: torch.cuda.Event | None = None

    def plan(self, batch: TokenBatch, kinds: Sequence[AttentionKind]) -> Plan:
        """Raises Unsupported."""
        self._wait_for_staging()
        for kind in kinds:
            check_kind(kind)
        spans, plan = batch.spans, Plan({kind: [] for kind in kinds})
        num_decodes = next((row for row, span in enumerate(spans) if span.num_tokens > 1), len(spans))
        if num_decodes:
            self._plan_decodes(plan, spans[:num_decodes], batch.block_tables)
        if num_decodes < len(spans):
            self._plan_prompts(plan, spans[num_decodes:], batch.block_tables, num_decodes)
        if batch.block_tables.device.type == "cuda":
            self._planned = torch.cuda.Event()
            self._planned.record()
        return plan

    def _plan_decodes(self, plan: Plan, spans: Sequence[QuerySpan], block_tables: Tensor) -> None:
        setup, pages = self._setup, self._pages(spans, block_tables)
        for kind, parts in plan.items():
            if kind not in self._decodes:
                self._decodes[kind] = _decode_wrapper(setup, kind)
            wrapper = self._decodes[kind]
            wrapper.plan(pages.indptr, pages.indices, pages.last_page_len, *_sizes(kind, setup), **_options(kind, setup))
            parts.append(PlannedRows(wrapper, 0, len(spans)))

    def _plan_prompts(self, plan: Plan, spans: Sequence[QuerySpan], block_tables: Tensor, first: int) -> None:
        setup, pages = self._setup, self._pages(spans, block_tables)
        counts = [span.num_tokens for span in spans]
        query_indptr = _pinned(np.cumsum([0, *counts], dtype=np.int32), block_tables.device)
        for kind, parts in plan.items():
            if kind not in self._prompts:
                wrapper = setup.flashinfer.BatchPrefillWithPagedKVCacheWrapper
                self._prompts[kind] = wrapper(setup.workspace, "NHD")
            self._prompts[kind].plan(
                query_indptr,
                pages.indptr,
                pages.indices,
                pages.last_page_len,
                *_sizes(kind, setup),
                causal=True,
                **_options(kind, setup),
                seq_lens=pages.num_tokens,  # pinned; what plan would make of the others is not
                max_token_per_sequence=max(counts),
            )
            parts.append(PlannedRows(self._prompts[kind], first, first + sum(counts)))

    def _pages(self, spans: Sequence[QuerySpan], block_tables: Tensor) -> PageList:
        slots, lengths = [span.slot for span in spans], [span.start + span.num_tokens for span in spans]
        return list_pages(slots, lengths, block_tables, self._setup.block_size)

    def _wait_for_staging(self) -> None:
        """A plan is written to pinned memory of the wrapper's own and copied from there in stream order. The next may be
        written only after that copy; the step before the last has ended by then, or the host is too far ahead."""
        if self._planned is not None:
            self._planned.synchronize()


class DecodeBuffers(NamedTuple):
    """What ``DecodeAttention``s of all sizes share, for one of them is valid at a time: a PageList on the device, and for
    each kind [bytes] that FlashInfer lays a plan out in."""

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    plans: list[Tensor]

    def has_room(self, num_rows: int, max_pages: int, num_kinds: int) -> bool:
        is_long = len(self.last_page_len) >= num_rows and len(self.indices) >= num_rows * max_pages
        return is_long and len(self.plans) == num_kinds


def decode_buffers(num_rows: int, max_pages: int, num_kinds: int, device: str) -> DecodeBuffers:
    """For up to so many decodes of up to so many pages each."""
    indptr, indices, last_page_len = (
        torch.zeros(count, dtype=torch.int32, device=device) for count in (num_rows + 1, num_rows * max_pages, num_rows)
    )
    plans = [torch.empty(_PLAN_BYTES, dtype=torch.uint8, device=device) for _ in range(num_kinds)]
    return DecodeBuffers(indptr, indices, last_page_len, plans)


class DecodeAttention:
    """Attention of exactly ``num_rows`` decodes, for a CUDA graph. What the kernels read lies in buffers that stay where
    they are; ``replan`` writes there what holds for the next replay.

    How a launch looks (its grid, where partial results go) follows from the number of rows alone here: with use_cuda_graph
    FA2 and the CUDA-core decode always split sequences, or never, whatever the lengths (FlashInfer's scheduler.cuh). So a
    graph that was captured at one length is right at any other.
    """

    plan: Plan

    def __init__(self, setup: AttentionSetup, buffers: DecodeBuffers, num_rows: int, kinds: Sequence[AttentionKind]) -> None:
        self._setup = setup
        self._num_rows, self._is_planned = num_rows, False
        self._indptr, self._indices = buffers.indptr[: num_rows + 1], buffers.indices
        self._last_page_len = buffers.last_page_len[:num_rows]
        self.plan = {}
        for kind, laid_out in zip(kinds, buffers.plans, strict=True):
            check_kind(kind)
            _check_workspace(kind, num_rows, setup.workspace.device)
            wrapper = _decode_wrapper(
                setup,
                kind,
                use_cuda_graph=True,
                paged_kv_indptr_buffer=self._indptr,
                paged_kv_indices_buffer=self._indices,
                paged_kv_last_page_len_buffer=self._last_page_len,
            )
            wrapper.reset_workspace_buffer(setup.workspace, laid_out)
            self.plan[kind] = [PlannedRows(wrapper, 0, num_rows)]

    def replan(self, slots: Sequence[int], num_tokens: Sequence[int], block_tables: Tensor) -> None:
        """Before each replay, and before the capture: row i attends to the first ``num_tokens[i]`` tokens of ``slots[i]``,
        its own among them. Does not wait for the device; the caller has waited for the step before, whose pinned memory this
        writes over. Rows that only pad the batch need a slot with a page that nobody else has, and one token."""
        if len(slots) != self._num_rows:
            raise ValueError(f"slots: {len(slots)} rows for a plan of {self._num_rows}")
        setup = self._setup
        pages = list_pages(slots, num_tokens, block_tables, setup.block_size)
        self._indptr.copy_(pages.indptr, non_blocking=True)
        self._indices[: len(pages.indices)].copy_(pages.indices)
        self._last_page_len.copy_(pages.last_page_len, non_blocking=True)
        for kind, ((wrapper, _, _),) in self.plan.items():
            where = (pages.indptr, pages.indices, pages.last_page_len, *_sizes(kind, setup))
            if self._is_planned:
                # The other way takes Python's maximum of a tensor: 0.7 ms for 256 lengths.
                setup.flashinfer.fast_decode_plan(
                    wrapper, *where, **_options(kind, setup), global_override_indptr_cpu=pages.indptr
                )
            else:
                wrapper.plan(*where, **_options(kind, setup))
        self._is_planned = True


class AttentionCall(NamedTuple):
    """What a layer asks ``TensorOps.attention`` for, but for the plan."""

    out: Tensor
    q: Tensor
    layer: KvLayer[Tensor]
    kind: AttentionKind


class AttentionGaps:
    """The plan of a forward that is captured for any sequences: each call is kept instead of made. ``cut`` ends the graph
    that leads up to it."""

    def __init__(self, cut: Callable[[], None]) -> None:
        self.calls: list[AttentionCall] = []
        self._cut = cut

    def keep(self, call: AttentionCall) -> None:
        self._cut()
        self.calls.append(call)


def attend(out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Plan, kind: AttentionKind, block_size: int) -> None:
    """Attention of q [N, heads, dim] over the pages, into out [N, heads * dim].

    Keys and values are strided views of the pages. Every kernel that can be chosen here takes its strides from the tensors;
    the CUDA-core decode and FA3 want those of the keys and the values to be the same, which they are.
    """
    keys, values = layer.data.view(-1, block_size, *layer.data.shape[1:]).unbind(2)
    for wrapper, first, end in plan[kind]:
        wrapper.run(q[first:end], (keys, values), out=out.view(q.shape)[first:end])


def _decode_wrapper(setup: AttentionSetup, kind: AttentionKind, **graph: Any) -> Any:
    wrapper = setup.flashinfer.BatchDecodeWithPagedKVCacheWrapper
    return wrapper(setup.workspace, "NHD", use_tensor_cores=_uses_tensor_cores(kind), backend="fa2", **graph)


def _check_workspace(kind: AttentionKind, num_rows: int, device: torch.device) -> None:
    """Raise Unsupported where a graph's partial results, which FA2 sizes by the number of rows, do not fit."""
    if not _uses_tensor_cores(kind):
        return
    is_cuda = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else _PROCESSORS
    group = kind.num_heads // kind.num_kv_heads
    tile = next(size for size in _TILES if group <= size or size == _TILES[-1])
    num_tiles = max(2 * processors // kind.num_kv_heads, -(-num_rows * group // tile) + num_rows - 1)
    if kind.num_heads * num_tiles * tile * (kind.head_dim + 1) * 4 > WORKSPACE_BYTES:
        raise Unsupported(
            f"scheduler.max_running_requests {num_rows}: partial results of so many decodes with {kind.num_heads} heads of "
            f"{kind.head_dim} do not fit in the {WORKSPACE_BYTES >> 20} MiB that there are for them; lower it"
        )


def _uses_tensor_cores(kind: AttentionKind) -> bool:
    """Heads that share keys stand in one tile of the tensor cores; below four the tile is mostly padding, and the kernel for
    CUDA cores is faster. That one is made for groups of 1, 2, 3, 4, 6 and 8, so none is left to it that it lacks."""
    return kind.num_heads // kind.num_kv_heads >= _TENSOR_CORES_FROM


def _sizes(kind: AttentionKind, setup: AttentionSetup) -> tuple[int, int, int, int]:
    """What every plan takes behind its pages."""
    return (kind.num_heads, kind.num_kv_heads, kind.head_dim, setup.block_size)


def _options(kind: AttentionKind, setup: AttentionSetup) -> dict[str, Any]:
    """What every plan takes by name. FlashInfer counts a window's tokens before the query's own; -1 is none."""
    return {
        "sm_scale": kind.scale,
        "window_left": -1 if kind.window is None else kind.window - 1,
        "logits_soft_cap": kind.soft_cap,
        "q_data_type": setup.dtype,
        "kv_data_type": setup.kv_dtype,
    }
