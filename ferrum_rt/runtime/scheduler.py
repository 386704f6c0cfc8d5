"""What the next step computes. Synchronous and pure: no clock, no tensor, no await.

There are no prefill and decode phases. Each sequence has a count of computed tokens that catches up with its tokens;
chunked prefill, decode, prefix hits and recompute after preemption are that one mechanism.

One step may be in flight while the next is planned. Pages can be given away at once all the same, because steps run in
the order of planning: whatever an earlier step still writes to a page, the new owner's step overwrites later.
"""

import heapq
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from ferrum_rt.interfaces.errors import DeadlineExceeded, EngineFailed, FerrumError, RequestValidationError
from ferrum_rt.interfaces.kv_cache import AllocationRequest, KvCacheHandle
from ferrum_rt.interfaces.model_executor import (
    DecodeInput,
    DecodeOutput,
    PageAppend,
    PageCopy,
    PrefillInput,
    PrefillOutput,
    SlotAssignment,
    StepInput,
    StepOutput,
    UnifiedBatch,
)
from ferrum_rt.interfaces.sampler import SampledToken, TokenScores
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import BatchId, FinishReason, Priority, RequestId, SchedulerStats, TokenId
from ferrum_rt.runtime.pages import PagedKvCache
from ferrum_rt.runtime.sequence import Sequence, SequenceState


@dataclass(slots=True)
class _Entry:
    """One sequence's part in a planned step: when it is committed, the tokens from ``start`` to ``end`` are computed in
    ``handle``'s pages."""

    sequence: Sequence
    handle: KvCacheHandle
    start: int
    end: int
    samples: bool


class UnifiedScheduler:
    """The Scheduler: most urgent first, decodes before prefill chunks, the least urgent preempted when pages run out."""

    def __init__(self, cache: PagedKvCache, *, num_pages: int, num_slots: int, max_model_len: int) -> None:
        self._cache = cache
        self._num_pages = num_pages
        self._max_model_len = max_model_len
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._sequences: dict[RequestId, list[Sequence]] = {}  # the samples of each request that have not ended
        self._waiting: dict[Priority, OrderedDict[Sequence, None]] = {
            priority: OrderedDict() for priority in sorted(Priority, reverse=True)
        }
        self._running: list[Sequence] = []  # most urgent first
        self._parked: dict[Sequence, None] = {}
        self._deadlines: list[tuple[float, int, SequenceRequest]] = []
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
        samples = [Sequence(request, self._num_arrivals + index, index) for index in range(request.num_samples)]
        self._num_arrivals += len(samples)
        self._prompt_tokens += len(request.token_ids)
        self._sequences[request.request_id] = samples
        for sequence in samples[1:]:
            sequence.state = SequenceState.HELD
        self._waiting[request.priority][samples[0]] = None
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, samples[0].arrival, request))

    def cancel(self, request_id: RequestId, index: int | None = None) -> bool:
        """Drop a request, or one of its samples, wherever it is, and free the pages now; False if it is not here (any
        more)."""
        samples = [sequence for sequence in self._sequences.get(request_id, ()) if index in (None, sequence.index)]
        for sequence in samples:
            self._finish(sequence)
        return bool(samples)

    def park(self, request_id: RequestId) -> None:
        """Leave a request out of the coming steps. Slots and pages stay with it until somebody waits for them."""
        for sequence in self._sequences.get(request_id, ()):
            if sequence.state not in (SequenceState.PARKED, SequenceState.HELD):
                self._leave_queue(sequence)
                sequence.state = SequenceState.PARKED
                self._parked[sequence] = None

    def unpark(self, request_id: RequestId) -> None:
        """Let a parked request go on."""
        for sequence in reversed(self._sequences.get(request_id, ())):
            if sequence.state is SequenceState.PARKED:
                del self._parked[sequence]
                if sequence.handle is not None:
                    self._run(sequence)
                else:
                    self._wait_in_front(sequence)

    def expire(self, now: float) -> list[SequenceUpdate]:
        """End the requests whose deadline has passed: with what they have, or with DeadlineExceeded if that is nothing."""
        updates = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            samples = self._live(request)
            if samples and not any(sequence.num_outputs for sequence in samples):
                updates.append(self._fail(request, DeadlineExceeded("the deadline passed before the first token")))
                continue
            for sequence in samples:
                self._finish(sequence)
                updates.append(_update(sequence, finish_reason=FinishReason.DEADLINE))
        return updates

    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request."""
        while self._deadlines:
            deadline, _, request = self._deadlines[0]
            if self._live(request):
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def statistics(self) -> SchedulerStats:
        cache = self._cache.statistics()
        running = {sequence.request.request_id for sequence in self._running}
        parked = {sequence.request.request_id for sequence in self._parked} - running
        return SchedulerStats(
            running=len(running),
            waiting=len(self._sequences) - len(running) - len(parked),
            parked=len(parked),
            preemptions=self._num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=cache.hit_tokens,
            generated_tokens=self._generated_tokens,
            pages=cache.pages,
        )

    # -- the step -----------------------------------------------------------------------------------------------------

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        """The next step, or None when there is nothing to compute."""
        step = StepInput([], [], [], UnifiedBatch([], []))
        entries: list[_Entry] = []
        preemptions = self._num_preemptions
        budget = hint.max_tokens - self._plan_decodes(step, entries)
        budget -= self._plan_prefills(step, entries, budget)
        if self._num_preemptions == preemptions:  # else what was freed is owed to those who run
            self._admit(step, entries, budget)
        for entry in entries:
            if entry.samples:
                self._release_samples(entry.sequence)
        if not step.batch:
            return None
        self._num_batches += 1
        batch_id = BatchId(self._num_batches)
        self._in_flight.append((batch_id, entries))
        return BatchPlan(batch_id=batch_id, step=step)

    def commit(self, plan: BatchPlan, output: StepOutput) -> list[SequenceUpdate]:
        """Take over what a step computed. Only now are its pages published."""
        entries = self._landed(plan)
        outputs: list[DecodeOutput | PrefillOutput] = [*output.decodes, *output.prefills]
        if len(entries) != len(outputs):
            raise EngineFailed(f"the executor returned {len(outputs)} outputs for {len(entries)} inputs")
        updates = []
        for entry, item in zip(entries, outputs, strict=True):
            sequence, sampled = entry.sequence, item.sampled
            if sequence.state is SequenceState.FINISHED:
                continue  # cancelled, or it ended one step ago: this token is the one that was computed ahead
            if sampled is not None and sampled.error is not None:
                updates.append(self._fail(sequence.request, sampled.error))
                continue
            if sequence.handle is entry.handle:  # not preempted since
                self._cache.publish(entry.handle, sequence.tokens, entry.end)
            prompt_scores = self._take_scores(entry, item) if isinstance(item, PrefillOutput) else ()
            if entry.samples and sampled is not None and sampled.token_id is not None:
                updates.append(self._append(sequence, sampled.token_id, sampled, prompt_scores))
            elif prompt_scores:
                updates.append(_update(sequence, prompt_scores=prompt_scores))
        return updates

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        """End every request of a step that could not be run."""
        return [
            self._fail(entry.sequence.request, error)
            for entry in self._landed(plan)
            if entry.sequence.state is not SequenceState.FINISHED
        ]

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
            entries.append(_Entry(sequence, handle, position, position + 1, True))
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
            handle = self._claim_pages(sequence, step, entries) if self._free_slots else None
            if handle is None:
                if self._preempt_parked():
                    continue
                return
            del self._waiting[request.priority][sequence]
            slot = self._free_slots.pop()
            sequence.start(slot, handle)
            self._run(sequence)
            pages = list(handle.table.pages)
            step.assigned.append(SlotAssignment(slot, request.request_id, sequence.sampling, pages, sequence.history))
            budget -= self._plan_chunk(sequence, step, entries, budget)

    def _claim_pages(self, sequence: Sequence, step: StepInput, entries: list[_Entry]) -> KvCacheHandle | None:
        """Those of another sample that has computed the prompt in an earlier step, all but its last token, whose logits are
        wanted; else what the prefix cache has, and new ones."""
        request, num_prompt = sequence.request, len(sequence.request.token_ids)
        if request.num_samples > 1 and not sequence.num_outputs:
            too_fresh = {entry.sequence for entry in entries if entry.start < num_prompt}
            for other in self._sequences[request.request_id]:
                if other.handle is not None and other.num_planned >= num_prompt and other not in too_fresh:
                    fork = self._cache.fork(other.handle, num_prompt - 1, room=num_prompt)
                    if fork is None:
                        return None
                    if fork.copy is not None:
                        step.copied.append(PageCopy(*fork.copy))
                    sequence.num_cached_tokens = other.num_cached_tokens
                    return fork.handle
        handle = self._cache.allocate(
            AllocationRequest(
                request_id=request.request_id,
                token_ids=sequence.tokens,
                num_tokens=len(sequence.tokens),
                salt=request.salt,
                reuse_prefix=not sequence.wants_scores,
            )
        )
        if handle is not None and not sequence.num_outputs:
            sequence.num_cached_tokens = handle.num_cached_tokens
        return handle

    def _release_samples(self, first: Sequence) -> None:
        """The prompt of ``first`` is computed by the step just planned; from the next on its siblings can share it."""
        for sequence in reversed(self._sequences[first.request.request_id]):
            if sequence.state is SequenceState.HELD:
                self._wait_in_front(sequence)

    def _plan_chunk(self, sequence: Sequence, step: StepInput, entries: list[_Entry], budget: int) -> int:
        start = sequence.num_planned
        end = min(start + budget, sequence.prefill_length)
        samples = end == sequence.prefill_length
        slot, handle = sequence.slot, sequence.handle
        assert slot is not None  # a running sequence has both
        assert handle is not None
        item = PrefillInput(slot, sequence.tokens[start:end], start, samples)
        if sequence.wants_scores:
            item.num_scores = sequence.request.prompt_logprobs
            item.token_after = sequence.tokens[end] if end < len(sequence.tokens) else None
        step.batch.prefills.append(item)
        sequence.num_planned = end
        sequence.num_pending += samples
        entries.append(_Entry(sequence, handle, start, end, samples))
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
        for sequence in self._parked:
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
                return next(iter(queue))
        return None

    def _wait_in_front(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        queue = self._waiting[sequence.request.priority]
        queue[sequence] = None
        queue.move_to_end(sequence, last=False)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        insort(self._running, sequence, key=lambda other: other.urgency)

    def _landed(self, plan: BatchPlan) -> list[_Entry]:
        batch_id, entries = self._in_flight.popleft()
        if batch_id != plan.batch_id:
            raise EngineFailed(f"step {plan.batch_id} was returned before step {batch_id}")
        return entries

    def _live(self, request: SequenceRequest) -> list[Sequence]:
        """The request's samples that have not ended."""
        samples = self._sequences.get(request.request_id, [])
        return list(samples) if samples and samples[0].request is request else []

    def _take_scores(self, entry: _Entry, output: PrefillOutput) -> Items[TokenScores]:
        """Scores of prompt tokens that were not scored before: a prefill may have been cut short and done again."""
        sequence, start = entry.sequence, entry.start
        fresh = output.scores[max(0, sequence.num_scored - start) :]
        sequence.num_scored += len(fresh)
        return fresh

    def _append(
        self, sequence: Sequence, token_id: TokenId, sampled: SampledToken, prompt_scores: Items[TokenScores]
    ) -> SequenceUpdate:
        sequence.num_pending -= 1
        sequence.tokens.append(token_id)
        sequence.mirostat_mu = sampled.mirostat_mu
        self._generated_tokens += 1
        request = sequence.request
        update = SequenceUpdate(
            request_id=request.request_id,
            index=sequence.index,
            token_ids=[token_id],
            scores=() if sampled.scores is None else (sampled.scores,),
            prompt_scores=prompt_scores,
            num_cached_tokens=sequence.num_cached_tokens,
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

    def _fail(self, request: SequenceRequest, error: FerrumError) -> SequenceUpdate:
        """End a request with all its samples."""
        for sequence in self._live(request):
            self._finish(sequence)
        return SequenceUpdate(request_id=request.request_id, token_ids=[], error=error)

    def _finish(self, sequence: Sequence) -> None:
        self._leave_queue(sequence)
        if sequence.handle is not None:
            self._release(sequence)
        sequence.state = SequenceState.FINISHED
        samples = self._sequences[sequence.request.request_id]
        samples.remove(sequence)
        if not samples:
            del self._sequences[sequence.request.request_id]

    def _leave_queue(self, sequence: Sequence) -> None:
        match sequence.state:
            case SequenceState.RUNNING:
                self._running.remove(sequence)
            case SequenceState.WAITING:
                del self._waiting[sequence.request.priority][sequence]
            case SequenceState.PARKED:
                del self._parked[sequence]

    def _release(self, sequence: Sequence) -> None:
        """Give back slot and pages."""
        if sequence.handle is not None and sequence.slot is not None:
            self._cache.deallocate(sequence.handle)
            self._free_slots.append(sequence.slot)
            sequence.stop()


def _update(
    sequence: Sequence,
    *,
    prompt_scores: Items[TokenScores] = (),
    finish_reason: FinishReason | None = None,
) -> SequenceUpdate:
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=[],
        prompt_scores=prompt_scores,
        finish_reason=finish_reason,
        num_cached_tokens=sequence.num_cached_tokens,
    )
