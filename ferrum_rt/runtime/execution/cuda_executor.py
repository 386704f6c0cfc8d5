"""The ModelExecutor for a GPU: a step is launched and not waited for; a step of decodes alone is two CUDA graphs, the model
and the draw, one with prompts a graph for each layer."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import EngineFailed, ResourceExhausted
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput, UnifiedBatch
from ferrum_rt.interfaces.sampler import SampledToken, Sampler, SamplingContext, TokenScores
from ferrum_rt.interfaces.tensor import AttentionKind, TensorOps
from ferrum_rt.interfaces.types import MemoryUsage, ModelInfo, TokenId
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch
from ferrum_rt.kernels.cuda.device import DeviceEvent, DeviceGraph, StreamDevice
from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams
from ferrum_rt.runtime.execution.sampler import not_numbers
from ferrum_rt.runtime.execution.step_inputs import StepInputs
from ferrum_rt.runtime.execution.step_pieces import StepPieces, piece_sizes
from ferrum_rt.runtime.execution.step_rows import (
    StepRows,
    lay_out,
    memory_of,
    outputs_of,
    page_rows,
    prompt_scores,
    table_changes,
)

T = TypeVar("T")

DrawTokens = Callable[[Tensor, DrawParams, DrawForm], Tensor]
"""Token ids [R] int64 from logits [R, vocabulary], -1 for a row without a finite maximum. It is captured in graphs, so it
may not wait for the device."""


class DecodeAttention(Protocol):
    """Attention of a fixed number of decodes, for a graph."""

    @property
    def plan(self) -> Any:
        """What ``TensorOps.attention`` is given. It stays the same, so that a graph can hold it."""
        ...

    def replan(self, slots: Sequence[int], num_tokens: Sequence[int], block_tables: Tensor) -> None:
        """Before each replay: row i attends to the first ``num_tokens[i]`` tokens of ``slots[i]``."""
        ...


class GraphOps(TensorOps[Tensor], Protocol):
    """TensorOps whose calls can be captured."""

    def decode_attention(self, num_rows: int, max_pages: int, kinds: Sequence[AttentionKind]) -> DecodeAttention: ...


class StreamDecoder(Protocol):
    """The part of the Decoder that runs steps."""

    @property
    def attention_kinds(self) -> Sequence[AttentionKind]: ...
    def plan_attention(self, batch: TokenBatch) -> Any: ...
    def forward(self, batch: TokenBatch, plan: Any, cache: list[KvPages]) -> Tensor: ...
    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor: ...


class _DecodeGraphs(NamedTuple):
    """``forward`` leaves the ``logits``, of which one of the ``draws`` makes tokens, by its form."""

    attention: DecodeAttention
    forward: DeviceGraph
    draws: list[DeviceGraph]
    logits: Tensor


class _Launch(NamedTuple):
    """What a launched step left on the device: a row of logits for each sampled row (and for padding), and what had to be
    waited for already."""

    logits: Tensor | None
    scores: list[list[TokenScores]]


def graph_sizes(num_slots: int) -> list[int]:
    """Batch sizes to capture, ascending: 1, 2, 4, then every 8 up to ``num_slots``, and that."""
    return sorted({size for size in (1, 2, 4, *range(8, num_slots, 8)) if size < num_slots} | {num_slots})


class CudaExecutor:
    """Block tables and the tokens sampled last live on the device. One slot and one page more than the scheduler knows of
    take what padding rows write. Made, used and closed in one thread, but that a second one waits for the device."""

    def __init__(
        self,
        model_info: ModelInfo,
        decoder: StreamDecoder,
        ops: GraphOps,
        sampler: Sampler[Tensor],
        cache: list[KvPages],
        device: StreamDevice,
        draw: DrawTokens,
        *,
        weight_bytes: int,
        num_slots: int,
        num_pages: int,
        block_size: int,
        max_tokens: int,
    ) -> None:
        """``cache`` has ``num_pages`` + 1 pages a layer; a step has up to ``max_tokens`` tokens."""
        self.model_info = model_info
        self.num_slots = num_slots
        self.num_pages = num_pages
        self.num_host_pages = 0  # a preempted sequence is computed again
        self.max_rounds = 1  # steps are launched ahead
        self.page_bytes = memory_of(0, cache).kv_cache // (num_pages + 1)
        self._decoder, self._ops, self._sampler, self._cache = decoder, ops, sampler, cache
        self._device, self._draw = device, draw
        self._weight_bytes, self._block_size = weight_bytes, block_size
        pages_per_slot = -(-model_info.max_model_len // block_size)
        with torch.inference_mode(), device.stream():
            self._block_tables = ops.zeros((num_slots + 1, pages_per_slot), torch.int64).fill_(num_pages)
            self._last_tokens = ops.zeros((num_slots + 1,), torch.int64)
            self._drawn = ops.zeros((num_slots,), torch.int64)
            self._row_numbers = torch.arange(num_slots, device=device.name)
            # Page changes, page copies, rows to sample from; slot, position and token of each row.
            words = 2 * num_slots * pages_per_slot + 3 * num_slots + 3 * max_tokens
            self._inputs = StepInputs(device, num_slots, words)
        self._is_plain = [True] * num_slots
        self._max_tokens = max_tokens
        self._graphs: dict[int, _DecodeGraphs] = {}
        self._pieces: dict[int, StepPieces] = {}
        # At most two steps are in flight. A step's results lie in one of two buffers until the thread that waits has read
        # them: the step before last has to be over before its buffers are used again. The engine has waited for it already.
        self._results = [device.pinned(num_slots, torch.int64) for _ in range(2)]
        self._flights: list[Future[StepOutput] | None] = [None, None]
        self._turn = 0
        self._planned: DeviceEvent | None = None
        self._failure: EngineFailed | None = None
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="ferrum-device-waiter")

    def capture_graphs(self, progress: Callable[[int, int], None]) -> None:
        """Before the first step. ``progress`` is told the graphs done and the graphs there are."""
        # The largest first: the others fit in the memory it took.
        prompts, decodes = piece_sizes(self._max_tokens)[::-1], graph_sizes(self.num_slots)[::-1]
        total = len(prompts) + len(decodes)
        with torch.inference_mode(), self._device.stream():
            for done, size in enumerate(prompts):
                progress(done, total)
                self._pieces[size] = self._capture_pieces(size)
            self._inputs.begin([self.num_slots] * self.num_slots, [1] * self.num_slots)
            self._inputs.upload()
            for done, size in enumerate(decodes, len(prompts)):
                progress(done, total)
                self._graphs[size] = self._capture(size)
            self._device.synchronize()
        self._graphs, self._pieces = dict(sorted(self._graphs.items())), dict(sorted(self._pieces.items()))
        progress(total, total)

    def execute(self, step: StepInput) -> "Future[StepOutput]":
        """Launch one step. Raises ResourceExhausted for one that found no memory twice, and EngineFailed from the device's
        first fault on, here or in the future."""
        if self._failure is not None:
            raise self._failure
        with torch.inference_mode(), self._device.stream():
            try:
                return self._launch(step)
            except Exception as error:
                raise self._settled(error) from error

    def close(self) -> None:
        self._waiter.shutdown()
        self._sampler.close()
        self._graphs.clear()
        self._pieces.clear()
        if self._failure is None:
            self._device.synchronize()

    def memory_usage(self) -> MemoryUsage:
        return memory_of(self._weight_bytes, self._cache)

    # -- launching, in the executor's thread --------------------------------------------------------------------------

    def _launch(self, step: StepInput) -> "Future[StepOutput]":
        self._turn ^= 1
        if (before_last := self._flights[self._turn]) is not None:
            wait([before_last])
        for assigned in step.assigned:
            self._is_plain[assigned.slot] = assigned.sampling.is_plain
            self._inputs.assign(assigned.slot, assigned.sampling)
            self._sampler.assign(assigned.slot, assigned.sampling, assigned.history)
        rows = lay_out(step.batch)
        others = [row for row, slot in enumerate(rows.sampled_slots) if not self._is_plain[slot]]
        context = rows.context(others)
        run = self._take_over(step, rows)
        if others:
            self._sampler.prepare(context)
        launched = self._with_memory(run)
        found: dict[int, SampledToken] = {}
        if others and launched.logits is not None:
            sample = partial(self._sample_others, launched.logits, others, context)
            found = dict(zip(others, self._with_memory(sample), strict=True))
        results = self._results[self._turn][: len(rows.sampled_slots)]
        if len(results):
            self._device.copy(results, self._drawn[: len(results)])
        finish = partial(self._finish, self._device.record(), results, step.batch, found, launched.scores)
        self._flights[self._turn] = flight = self._waiter.submit(finish)
        return flight

    def _take_over(self, step: StepInput, rows: StepRows) -> Callable[[], _Launch]:
        """Bring the step to the device, and there what changed in the slots: that allocates nothing, so it cannot fail for
        want of memory, and the step behind this one finds its slots whatever becomes of it. Returns what is left to do."""
        inputs, num_rows = self._inputs, len(rows.slots)
        has_prompts = bool(step.batch.prefills)
        size = next((size for size in (self._pieces if has_prompts else self._graphs) if size >= num_rows), num_rows)
        padding = 0 if has_prompts else size - num_rows  # a graph of decodes draws for all its rows
        inputs.begin([*rows.sampled_slots, *[self.num_slots] * padding], [*rows.sampled_positions, *[1] * padding])
        run: Callable[[], _Launch]
        if has_prompts or size not in self._graphs:
            # These come first, so that they stand where the graphs of this size read them.
            tokens = self._put_rows(rows.slots, rows.positions, [*[-1] * rows.num_decodes, *rows.known], size)
            run = partial(self._run, step.batch, rows, *tokens, inputs.put(rows.logit_rows))
        else:
            run = partial(self._replay, size, rows)
        at, pages = (inputs.put(values) for values in table_changes(step, self._block_tables.shape[1]))
        sources = inputs.put([item.source for item in step.copied])
        targets = inputs.put([item.target for item in step.copied])
        inputs.upload()
        if len(at):
            self._block_tables.view(-1).index_copy_(0, at, pages)

        def copy_and_run() -> _Launch:
            if len(sources):
                for layer in self._cache:
                    self._ops.copy_kv(layer, page_rows(sources, self._block_size), page_rows(targets, self._block_size))
            return run()

        return copy_and_run

    def _replay(self, size: int, rows: StepRows) -> _Launch:
        """Decodes alone: the graph of the next larger size."""
        graphs, padding = self._graphs[size], size - len(rows.slots)
        self._wait_for_plan()
        graphs.attention.replan(
            [*rows.slots, *[self.num_slots] * padding],
            [*(position + 1 for position in rows.positions), *[1] * padding],
            self._block_tables,
        )
        self._planned = self._device.record()
        graphs.forward.replay()
        graphs.draws[self._inputs.form].replay()
        return _Launch(graphs.logits, [])

    def _run(
        self, items: UnifiedBatch, rows: StepRows, slots: Tensor, positions: Tensor, known: Tensor, logit_rows: Tensor
    ) -> _Launch:
        """A step of any kind: in pieces, if there are any of its size."""
        pieces = self._pieces.get(len(slots))
        if pieces is None:
            batch = self._batch(slots, positions, known, logit_rows, rows.spans)
        else:
            batch = replace(pieces.batch, spans=rows.spans)
        self._wait_for_plan()
        plan = self._decoder.plan_attention(batch)
        self._planned = self._device.record()
        if pieces is None:
            hidden = self._decoder.forward(batch, plan, self._cache)
        else:
            hidden = pieces.replay(plan, len(rows.slots))
        logits_of = partial(self._decoder.logits, hidden)
        scores = [
            prompt_scores(logits_of, self._sampler, item, span, self._row_numbers)
            for item, span in zip(items.prefills, rows.prefill_spans, strict=True)
        ]
        if not rows.logit_rows:
            return _Launch(None, scores)
        logits = logits_of(logit_rows)
        self._draw_tokens(logits, self._inputs.form)
        return _Launch(logits, scores)

    def _capture(self, size: int) -> _DecodeGraphs:
        attention = self._ops.decode_attention(size, self._block_tables.shape[1], self._decoder.attention_kinds)
        attention.replan([self.num_slots] * size, [1] * size, self._block_tables)
        found: list[Tensor] = []

        def decode(cut: Callable[[], None]) -> None:
            rows = self._inputs.rows(size)
            spans = [QuerySpan(self.num_slots, row, 1, 0) for row in range(size)]
            batch = self._batch(rows.slots, rows.positions, None, self._row_numbers[:size], spans)
            hidden = self._decoder.forward(batch, attention.plan, self._cache)
            found[:] = [self._decoder.logits(hidden, batch.logit_rows)]
            for form in DrawForm:
                cut()
                self._draw_tokens(found[0], form)

        decode(lambda: None)  # kernels are compiled and libraries set up at their first use, which cannot be captured
        forward, *draws = self._device.capture(partial(decode, self._device.cut))
        return _DecodeGraphs(attention, forward, draws, found[0])

    def _capture_pieces(self, size: int) -> StepPieces:
        self._inputs.begin([], [])
        tokens = self._put_rows([], [], [], size)
        self._inputs.upload()
        # Decodes and, if there is room, a prompt: each has kernels of its own, which are to be there before the first step.
        num_decodes = size - 2 if size > 1 else size
        spans = [QuerySpan(self.num_slots, row, 1, 0) for row in range(num_decodes)]
        spans += [QuerySpan(self.num_slots, num_decodes, 2, 0)] if size > 1 else []
        first = self._batch(*tokens, self._row_numbers[:0], spans)
        # Once as it is: what has to be set up at its first use cannot be captured.
        self._decoder.forward(first, self._decoder.plan_attention(first), self._cache)

        def forward(plan: Any) -> tuple[TokenBatch, Tensor]:
            batch = self._batch(*tokens, self._row_numbers[:0], spans)
            return batch, self._decoder.forward(batch, plan, self._cache)

        return StepPieces(self._device, self._ops, forward)

    def _put_rows(
        self, slots: Sequence[int], positions: Sequence[int], known: Sequence[int], size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each of them [size]: what is missing belongs to the scratch slot."""
        padding = size - len(slots)
        put = self._inputs.put
        return (
            put([*slots, *[self.num_slots] * padding]),
            put([*positions, *[0] * padding]),
            put([*known, *[0] * padding]),
        )

    def _batch(
        self, slots: Tensor, positions: Tensor, known: Tensor | None, logit_rows: Tensor, spans: list[QuerySpan]
    ) -> TokenBatch:
        """Rows whose tokens are the ``known`` ones; where these are negative, or None, they are those sampled last."""
        size, pages_per_slot = self._block_size, self._block_tables.shape[1]
        pages = self._block_tables.view(-1).index_select(0, slots * pages_per_slot + positions // size)
        last = self._last_tokens.index_select(0, slots)
        return TokenBatch(
            token_ids=last if known is None else torch.where(known < 0, last, known),
            positions=positions,
            kv_slots=pages * size + positions % size,
            logit_rows=logit_rows,
            spans=spans,
            block_tables=self._block_tables,
            block_size=size,
        )

    def _draw_tokens(self, logits: Tensor, form: DrawForm) -> None:
        """A token for each row, kept for the next step and for the host."""
        rows = self._inputs.rows(len(logits))
        tokens = self._draw(logits, rows.draw, form)
        self._drawn[: len(logits)].copy_(tokens)
        self._last_tokens.index_copy_(0, rows.slots, tokens.clamp(min=0))

    def _sample_others(self, logits: Tensor, others: list[int], context: SamplingContext) -> Sequence[SampledToken]:
        """The rows that the draw in the graph is not enough for, from the same logits. This waits for the device, so the
        next step is launched only when this one is nearly over."""
        is_all = others == list(range(len(logits)))
        found = self._sampler.sample(logits if is_all else logits[others], context)
        slots = torch.tensor(context.slots, device=self._device.name)
        tokens = torch.tensor([item.token_id or 0 for item in found], device=self._device.name)
        self._last_tokens.index_copy_(0, slots, tokens)
        return found

    def _wait_for_plan(self) -> None:
        """FlashInfer writes a plan to pinned memory of its own, out of which it is copied in its turn in the stream: the
        last plan's copy must be over. It stands before its step's first kernel, so that is so when the step before that
        one has ended, which the engine has waited for."""
        if self._planned is not None:
            self._planned.wait()

    def _with_memory(self, function: Callable[[], T]) -> T:
        """Once more with all the memory there is, if there was not enough."""
        try:
            return function()
        except Exception as error:
            if not self._device.is_out_of_memory(error):
                raise
        self._device.empty_cache()
        return function()

    def _settled(self, error: Exception) -> Exception:
        """Why a step cannot be launched. What was enqueued of it still reads pinned memory that the next one writes."""
        try:
            self._device.synchronize()
        except Exception as fault:  # a kernel's fault shows in whatever comes after it
            error = fault
        return self._as_ours(error)

    # -- the end of a step, in the thread that waits ------------------------------------------------------------------

    def _finish(
        self,
        event: DeviceEvent,
        results: Tensor,
        batch: UnifiedBatch,
        found: dict[int, SampledToken],
        scores: list[list[TokenScores]],
    ) -> StepOutput:
        try:
            event.wait()
        except Exception as error:
            raise self._as_ours(error) from error
        drawn: list[int] = results.tolist()
        tokens = [found[row] if row in found else _sampled(token) for row, token in enumerate(drawn)]
        return outputs_of(batch, tokens, scores)

    def _as_ours(self, error: Exception) -> Exception:
        if self._device.is_out_of_memory(error):
            return ResourceExhausted(
                "the GPU has no memory left for this request's step, and had none when it was tried again; lower "
                f"memory.utilization or batching.max_batched_tokens ({error})"
            )
        if self._device.is_fatal(error):
            self._failure = EngineFailed(f"the GPU failed, and is lost to this process: {error}")
            return self._failure
        return error


def _sampled(token: int) -> SampledToken:
    if token >= 0:
        return SampledToken(TokenId(token))
    return SampledToken(None, error=not_numbers())
