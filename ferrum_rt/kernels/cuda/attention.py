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
from ferrum_rt.kernels.batch import TokenBatch

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 384 * 2**20
"""For partial results of split sequences: at most 2 * SMs * heads per group * queries per tile * head dim * 4 are taken."""
_TENSOR_CORES_FROM = 4


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


class EagerAttention:
    """Attention of steps of any shape: chunks of prompts, and decodes as rows of one query. One plan is valid at a time."""

    def __init__(self, setup: AttentionSetup) -> None:
        self._setup = setup
        self._wrappers: dict[AttentionKind, Any] = {}
        self._planned: torch.cuda.Event | None = None

    def plan(self, batch: TokenBatch, kinds: Sequence[AttentionKind]) -> dict[AttentionKind, Any]:
        """A planned wrapper for each kind. Raises Unsupported."""
        self._wait_for_staging()
        setup = self._setup
        counts = [span.num_tokens for span in batch.spans]
        pages = list_pages(
            [span.slot for span in batch.spans],
            [span.start + span.num_tokens for span in batch.spans],
            batch.block_tables,
            setup.block_size,
        )
        device = batch.block_tables.device
        query_indptr = _pinned(np.cumsum([0, *counts], dtype=np.int32), device)
        for kind in kinds:
            self._wrapper(kind).plan(
                query_indptr,
                pages.indptr,
                pages.indices,
                pages.last_page_len,
                *_sizes(kind, setup),
                causal=True,
                **_options(kind, setup),
                seq_lens=pages.num_tokens,  # pinned; what plan would make of the others is not
            )
        if device.type == "cuda":
            self._planned = torch.cuda.Event()
            self._planned.record()
        return {kind: self._wrappers[kind] for kind in kinds}

    def _wrapper(self, kind: AttentionKind) -> Any:
        if kind not in self._wrappers:
            check_kind(kind)
            wrapper = self._setup.flashinfer.BatchPrefillWithPagedKVCacheWrapper
            self._wrappers[kind] = wrapper(self._setup.workspace, "NHD")
        return self._wrappers[kind]

    def _wait_for_staging(self) -> None:
        """A plan is written to pinned memory of the wrapper's own and copied from there in stream order. The next may be
        written only after that copy; the step before the last has ended by then, or the host is too far ahead."""
        if self._planned is not None:
            self._planned.synchronize()


class DecodeAttention:
    """Attention of exactly ``num_rows`` decodes, for a CUDA graph. What the kernels read lies in buffers that stay where
    they are; ``replan`` writes there what holds for the next replay.

    How a launch looks (its grid, where partial results go) follows from the number of rows alone here: with use_cuda_graph
    FA2 and the CUDA-core decode always split sequences, or never, whatever the lengths (FlashInfer's scheduler.cuh). So a
    graph that was captured at one length is right at any other.
    """

    plan: dict[AttentionKind, Any]

    def __init__(self, setup: AttentionSetup, num_rows: int, max_pages: int, kinds: Sequence[AttentionKind]) -> None:
        self._setup = setup
        self._num_rows = num_rows
        device = setup.workspace.device
        indptr = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)
        indices = torch.zeros(num_rows * max_pages, dtype=torch.int32, device=device)
        last_page_len = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.plan = {}
        for kind in kinds:
            check_kind(kind)
            # The kinds share buffers: the pages are the same for all.
            self.plan[kind] = setup.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                setup.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=_uses_tensor_cores(kind),
                paged_kv_indptr_buffer=indptr,
                paged_kv_indices_buffer=indices,
                paged_kv_last_page_len_buffer=last_page_len,
                backend="fa2",
            )

    def replan(self, slots: Sequence[int], num_tokens: Sequence[int], block_tables: Tensor) -> None:
        """Before each replay, and before the capture: row i attends to the first ``num_tokens[i]`` tokens of ``slots[i]``,
        its own among them. Does not wait for the device; the caller has waited for the step before, whose pinned memory this
        writes over. Rows that only pad the batch need a slot with a page that nobody else has, and one token."""
        if len(slots) != self._num_rows:
            raise ValueError(f"slots: {len(slots)} rows for a plan of {self._num_rows}")
        setup = self._setup
        pages = list_pages(slots, num_tokens, block_tables, setup.block_size)
        for kind, wrapper in self.plan.items():
            wrapper.plan(
                pages.indptr,
                pages.indices,
                pages.last_page_len,
                *_sizes(kind, setup),
                **_options(kind, setup),
            )


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


def attend(
    out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: dict[AttentionKind, Any], kind: AttentionKind, block_size: int
) -> None:
    """Attention of q [N, heads, dim] over the pages, into out [N, heads * dim].

    Keys and values are strided views of the pages. Every kernel that can be chosen here takes its strides from the tensors;
    the CUDA-core decode and FA3 want those of the keys and the values to be the same, which they are.
    """
    keys, values = layer.data.view(-1, block_size, *layer.data.shape[1:]).unbind(2)
    plan[kind].run(q, (keys, values), out=out.view(q.shape))


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
