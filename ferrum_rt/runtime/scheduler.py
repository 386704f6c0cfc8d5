"""What the next step computes. Synchronous and pure: no clock, no tensor, no await.

There are no prefill and decode phases. Each sequence has a count of computed tokens that catches up with its tokens;
chunked prefill, decode, prefix hits and recompute after preemption are that one mechanism.

One step may be in flight while the next is planned. Pages can be given away at once all the same, because steps run in
the order of planning: whatever an earlier step still writes to a page, the new owner's step overwrites later.
"""

import heapq
from bisect import insort
from collections import OrderedDict, deque
from dataclasses import dataclass

from ferrum_rt.interfaces.errors import BackendError, DeadlineExceeded, EngineFailed, FerrumError, RequestValidationError
from ferrum_rt.interfaces.kv_cache import AllocationRequest, KvCacheHandle
from ferrum_rt.interfaces.model_executor import (
    DecodeInput,
    PageAppend,
    PrefillInput,
    SlotAssignment,
    StepInput,
    StepOutput,
    UnifiedBatch,
)
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import BatchId, FinishReason, Priority, RequestId, SchedulerStats, TokenId
from ferrum_rt.runtime.pages import PagedKvCache
from ferrum_rt.runtime.sequence import Sequence, SequenceState


@dataclass(slots=True)
class _Entry:
    """One sequence's part in a planned step: when it is committed, ``end`` tokens are computed in ``handle``'s pages."""

    sequence: Sequence
    handle: KvCacheHandle
    end: int
    samples: bool


class UnifiedScheduler:
    """The Scheduler: most urgent first, decodes before prefill chunks, the least urgent preempted when pages run out."""

    def __init__(self, cache: PagedKvCache, *, num_pages: int, num_slots: int, max_model_len: int) -> None:
        self._cache = cache
        self._num_pages = num_pages
        self._max_model_len = max_model_len
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._sequences: dict[RequestId, Sequence] = {}
        self._waiting: dict[Priority, OrderedDict[RequestId, Sequence]] = {
            priority: OrderedDict() for priority in sorted(Priority, reverse=True)
        }
        self._running: list[Sequence] = []  # most urgent first
        self._parked: dict[RequestId, Sequence] = {}
        self._deadlines: list[tuple[float, int, RequestId]] = []
        self._in_flight: deque[tuple[BatchId, list[_Entry]]] = deque()
        self._num_arrivals = 0
        self._num_batches = 0
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    # -- from the side ------------------------------------------------------------------------------------------------

    def submit(self, request: SequenceRequest) -> None:
        """Queue a request; raises RequestValidationError for one that could never fit, with the numbers."""
        if request.request_id in self._sequences:
            raise RequestValidationError(f"id: a request {request.request_id!r} is already under way")
        self._check_fits(len(request.token_ids), request.max_tokens)
        sequence = Sequence(request, self._num_arrivals)
        self._num_arrivals += 1
        self._prompt_tokens += len(request.token_ids)
        self._sequences[request.request_id] = sequence
        self._waiting[request.priority][request.request_id] = sequence
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, sequence.arrival, request.request_id))

    def cancel(self, request_id: RequestId) -> bool:
        """Drop a request, wherever it is, and free its pages now; False if it is not here (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence)
        return True

    def park(self, request_id: RequestId) -> None:
        """Leave a sequence out of the coming steps. Its slot and pages stay with it until somebody waits for them."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.state is not SequenceState.PARKED:
            self._leave_queue(sequence)
            sequence.state = SequenceState.PARKED
            self._parked[request_id] = sequence

    def unpark(self, request_id: RequestId) -> None:
        """Let a parked sequence go on."""
        sequence = self._parked.pop(request_id, None)
        if sequence is None:
            return
        if sequence.handle is not None:
            self._run(sequence)
        else:
            self._wait_in_front(sequence)

    def expire(self, now: float) -> list[SequenceUpdate]:
        """End the requests whose deadline has passed: with what they have, or with DeadlineExceeded if that is nothing."""
        updates = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, request_id = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.arrival != arrival:
                continue
            self._finish(sequence)
            update = SequenceUpdate(request_id=request_id, token_ids=[], num_cached_tokens=sequence.num_cached_tokens)
            if sequence.num_outputs:
                update.finish_reason = FinishReason.DEADLINE
            else:
                update.error = DeadlineExceeded("the deadline passed before the first token")
            updates.append(update)
        return updates

    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request."""
        while self._deadlines:
            deadline, arrival, request_id = self._deadlines[0]
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.arrival == arrival:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def statistics(self) -> SchedulerStats:
        cache = self._cache.statistics()
        return SchedulerStats(
            running=len(self._running),
            waiting=sum(len(queue) for queue in self._waiting.values()),
            parked=len(self._parked),
            preemptions=self._num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=cache.hit_tokens,
            generated_tokens=self._generated_tokens,
            pages=cache.pages,
        )

    # -- the step -----------------------------------------------------------------------------------------------------

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        """The next step, or None when there is nothing to compute."""
        step = StepInput([], [], UnifiedBatch([], []))
        entries: list[_Entry] = []
        preemptions = self._num_preemptions
        budget = hint.max_tokens - self._plan_decodes(step, entries)
        budget -= self._plan_prefills(step, entries, budget)
        if self._num_preemptions == preemptions:  # else what was freed is owed to those who run
            self._admit(step, entries, budget)
        if not step.batch:
            return None
        self._num_batches += 1
        batch_id = BatchId(self._num_batches)
        self._in_flight.append((batch_id, entries))
        return BatchPlan(batch_id=batch_id, step=step)

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[SequenceUpdate]:
        """Take over what a step computed. Only now are its pages published."""
        entries = self._landed(plan)
        token_ids = [item.token_id for item in output.decodes] + [item.token_id for item in output.prefills]
        if len(entries) != len(token_ids):
            raise EngineFailed(f"the executor returned {len(token_ids)} outputs for {len(entries)} inputs")
        updates = []
        for entry, token_id in zip(entries, token_ids, strict=True):
            sequence = entry.sequence
            if sequence.state is SequenceState.FINISHED:
                continue  # cancelled, or it ended one step ago: this token is the one that was computed ahead
            if entry.samples and token_id is None:
                self._finish(sequence)
                error = BackendError("the model's logits are not numbers (NaN) for this request")
                updates.append(SequenceUpdate(request_id=sequence.request.request_id, token_ids=[], error=error))
                continue
            if sequence.handle is entry.handle:  # not preempted since
                self._cache.publish(entry.handle, sequence.tokens, entry.end)
            if entry.samples and token_id is not None:
                updates.append(self._append(sequence, token_id))
        return updates

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        """End every request of a step that could not be run."""
        updates = []
        for entry in self._landed(plan):
            if entry.sequence.state is not SequenceState.FINISHED:
                self._finish(entry.sequence)
                request_id = entry.sequence.request.request_id
                updates.append(SequenceUpdate(request_id=request_id, token_ids=[], error=error))
        return updates

    # -- planning -----------------------------------------------------------------------------------------------------

    def _plan_decodes(self, step: StepInput, entries: list[_Entry]) -> int:
        for sequence in list(self._running):
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted for a more urgent one, earlier in this loop
            if not sequence.is_decoding or sequence.is_fully_planned:
                continue
            handle = self._make_room(sequence, step)
            if handle is None or sequence.slot is None:
                continue
            position = sequence.num_planned
            step.batch.decodes.append(DecodeInput(sequence.slot, position))
            sequence.num_planned = position + 1
            sequence.num_pending += 1
            entries.append(_Entry(sequence, handle, position + 1, True))
        return len(entries)

    def _plan_prefills(self, step: StepInput, entries: list[_Entry], budget: int) -> int:
        spent = 0
        for sequence in self._running:
            if spent < budget and sequence.num_planned < sequence.prefill_length:
                spent += self._plan_chunk(sequence, step, entries, budget - spent)
        return spent

    def _admit(self, step: StepInput, entries: list[_Entry], budget: int) -> None:
        while budget > 0 and (sequence := self._next_waiting()) is not None:
            request = sequence.request
            wanted = AllocationRequest(
                request_id=request.request_id,
                token_ids=sequence.tokens,
                num_tokens=len(sequence.tokens),
                salt=request.salt,
            )
            handle = self._cache.allocate(wanted) if self._free_slots else None
            if handle is None:
                if self._preempt_parked():
                    continue
                return
            del self._waiting[request.priority][request.request_id]
            if not sequence.num_outputs:
                sequence.num_cached_tokens = handle.num_cached_tokens
            slot = self._free_slots.pop()
            sequence.start(slot, handle)
            self._run(sequence)
            step.assigned.append(SlotAssignment(slot, request.request_id, request.sampling, list(handle.table.pages)))
            budget -= self._plan_chunk(sequence, step, entries, budget)

    def _plan_chunk(self, sequence: Sequence, step: StepInput, entries: list[_Entry], budget: int) -> int:
        start = sequence.num_planned
        end = min(start + budget, sequence.prefill_length)
        samples = end == sequence.prefill_length
        slot, handle = sequence.slot, sequence.handle
        assert slot is not None  # a running sequence has both
        assert handle is not None
        step.batch.prefills.append(PrefillInput(slot, sequence.tokens[start:end], start, samples))
        sequence.num_planned = end
        sequence.num_pending += samples
        entries.append(_Entry(sequence, handle, end, samples))
        return end - start

    def _make_room(self, sequence: Sequence, step: StepInput) -> KvCacheHandle | None:
        """A page for the sequence's next token, preempting the least urgent; None if that was the sequence itself."""
        while (handle := sequence.handle) is not None:
            pages = handle.table.pages
            known = len(pages)
            if self._cache.extend(handle, sequence.num_planned + 1):
                if len(pages) > known and sequence.slot is not None:
                    step.appended.append(PageAppend(sequence.slot, known, pages[known]))
                return handle
            if not self._preempt_parked():
                self._preempt(self._running[-1])
        return None

    def _preempt_parked(self) -> bool:
        for sequence in self._parked.values():
            if sequence.handle is not None:
                self._release(sequence)
                self._num_preemptions += 1
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._wait_in_front(sequence)
        self._num_preemptions += 1

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _check_fits(self, prompt: int, max_tokens: int) -> None:
        if prompt < 1:
            raise RequestValidationError("prompt has no tokens")
        if prompt + max_tokens > self._max_model_len:
            raise RequestValidationError(
                f"prompt ({prompt} tokens) + max_tokens ({max_tokens}) = {prompt + max_tokens} is more than the engine's "
                f"max_model_len of {self._max_model_len}; shorten the prompt or lower max_tokens"
            )
        pages = self._cache.pages_for(prompt + max_tokens)
        if pages > self._num_pages:
            raise RequestValidationError(
                f"prompt ({prompt} tokens) + max_tokens ({max_tokens}) need {pages} KV pages of {self._cache.block_size} "
                f"tokens, and the engine has {self._num_pages}; raise kv_cache.num_pages or ask for less"
            )

    def _next_waiting(self) -> Sequence | None:
        for queue in self._waiting.values():
            if queue:
                return next(iter(queue.values()))
        return None

    def _wait_in_front(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        queue = self._waiting[sequence.request.priority]
        queue[sequence.request.request_id] = sequence
        queue.move_to_end(sequence.request.request_id, last=False)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        insort(self._running, sequence, key=lambda other: other.urgency)

    def _landed(self, plan: BatchPlan) -> list[_Entry]:
        batch_id, entries = self._in_flight.popleft()
        if batch_id != plan.batch_id:
            raise EngineFailed(f"step {plan.batch_id} was returned before step {batch_id}")
        return entries

    def _append(self, sequence: Sequence, token_id: TokenId) -> SequenceUpdate:
        sequence.num_pending -= 1
        sequence.tokens.append(token_id)
        self._generated_tokens += 1
        request = sequence.request
        update = SequenceUpdate(
            request_id=request.request_id, token_ids=[token_id], num_cached_tokens=sequence.num_cached_tokens
        )
        if token_id in request.stop_token_ids:
            update.finish_reason = FinishReason.STOP
        elif token_id in request.eos_token_ids:
            update.finish_reason = FinishReason.EOS
        elif sequence.num_outputs >= request.max_tokens:
            update.finish_reason = FinishReason.LENGTH
        if update.finish_reason is not None:
            self._finish(sequence)
        return update

    def _finish(self, sequence: Sequence) -> None:
        self._leave_queue(sequence)
        if sequence.handle is not None:
            self._release(sequence)
        sequence.state = SequenceState.FINISHED
        del self._sequences[sequence.request.request_id]

    def _leave_queue(self, sequence: Sequence) -> None:
        request = sequence.request
        match sequence.state:
            case SequenceState.RUNNING:
                self._running.remove(sequence)
            case SequenceState.WAITING:
                del self._waiting[request.priority][request.request_id]
            case SequenceState.PARKED:
                del self._parked[request.request_id]

    def _release(self, sequence: Sequence) -> None:
        """Give back slot and pages."""
        if sequence.handle is not None and sequence.slot is not None:
            self._cache.deallocate(sequence.handle)
            self._free_slots.append(sequence.slot)
            sequence.stop()
