"""What the next step computes. Synchronous and pure: no clock, no tensor, no await.

Decodes come first, then as much of prompts as leaves the decodes their pace; whose prompts those are, waiting.py says. There
are no prefill and decode phases. Each sequence has a count of computed tokens that catches up with its tokens;
chunked prefill, decode, prefix hits and recompute after preemption are that one mechanism.

One step may be in flight while the next is planned. Pages can be given away at once all the same, because steps run in
the order of planning: whatever an earlier step still writes to a page, the new owner's step overwrites later.
"""

from collections import Counter, deque
from collections.abc import Sequence as Items

from ferrum_rt.interfaces.config import SchedulerConfig
from ferrum_rt.interfaces.errors import (
    DeadlineExceeded,
    EngineFailed,
    FerrumError,
    RequestValidationError,
    ResourceExhausted,
)
from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.model_executor import (
    DecodeInput,
    DecodeOutput,
    PageAppend,
    PrefillInput,
    PrefillOutput,
    SlotAssignment,
    StepInput,
    StepOutput,
    UnifiedBatch,
)
from ferrum_rt.interfaces.sampler import SampledToken, TokenScores
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SavedState, SequenceRequest, SequenceUpdate
from ferrum_rt.interfaces.types import (
    BatchId,
    ClientId,
    FinishReason,
    Priority,
    RequestId,
    SchedulerDiagnostics,
    SchedulerStats,
    TokenId,
)
from ferrum_rt.runtime.scheduling.claims import check_fits, claim_pages
from ferrum_rt.runtime.scheduling.clients import Clients
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.deadlines import Deadlines
from ferrum_rt.runtime.scheduling.pace import Pace
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.planned import Entry, PlannedStep
from ferrum_rt.runtime.scheduling.residents import Residents
from ferrum_rt.runtime.scheduling.roster import Roster
from ferrum_rt.runtime.scheduling.saved_state import restored, save
from ferrum_rt.runtime.scheduling.scheduler_reports import diagnose, estimate_wait
from ferrum_rt.runtime.scheduling.sequence import Sequence, SequenceState
from ferrum_rt.runtime.scheduling.sessions import Sessions
from ferrum_rt.runtime.scheduling.swapping import Swapping
from ferrum_rt.runtime.scheduling.trials import Trials
from ferrum_rt.runtime.scheduling.waiting import WaitingQueue

_MAX_EVICTIONS = 4  # in a step, for the sake of those who wait


class UnifiedScheduler:
    """The Scheduler. ``sessions`` are for callers to end and to fork; ``num_host_pages`` of ``page_bytes`` to swap to. The
    executor can let decodes go ``max_rounds`` times in a step."""

    def __init__(
        self,
        cache: PagedKvCache,
        *,
        num_slots: int,
        max_model_len: int,
        config: SchedulerConfig = SchedulerConfig(),  # noqa: B008 - it is frozen
        num_host_pages: int = 0,
        page_bytes: int = 0,
        max_rounds: int = 1,
    ) -> None:
        self._cache = cache
        self._pace = Pace(config)
        self._clients = Clients(config)
        self._max_model_len = max_model_len
        self._max_rounds = max_rounds
        self._residents = Residents(cache, self._clients, num_slots=num_slots)
        self.swapping = Swapping(cache, self._pace.costs, num_pages=num_host_pages, page_bytes=page_bytes)
        self.sessions = Sessions(cache, self.swapping, self._clients, config)
        self._waiting = WaitingQueue(self._clients, config.ageing_steps)
        self._roster = Roster(self._clients, self._waiting, self._residents, self.sessions, self.swapping)
        self._deadlines = Deadlines(lambda request: bool(self._roster.live(request)))
        self._in_flight: deque[PlannedStep] = deque()
        self._trials = Trials()
        self._num_batches = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    # -- from the side ------------------------------------------------------------------------------------------------

    def submit(self, request: SequenceRequest) -> None:
        """Queue a request; raises RequestValidationError for one that could never fit, with the numbers."""
        if request.request_id in self._roster.sequences:
            raise RequestValidationError(f"id: a request {request.request_id!r} is already under way")
        num_prompt = len(request.token_ids)
        check_fits(self._cache, num_prompt, request.max_tokens, max_model_len=self._max_model_len)
        fault = self._clients.why_not_queue(request.client_id, num_prompt)
        if fault is not None:
            raise ResourceExhausted(fault, retry_after=self.estimated_wait_s())
        self._prompt_tokens += num_prompt
        self._roster.arrive(request)
        if request.deadline is not None:
            self._deadlines.add(request.deadline - self._pace.soonest(num_prompt), request)

    def cancel(self, request_id: RequestId, index: int | None = None) -> bool:
        """Drop a request, or one of its samples, wherever it is, and free the pages now; False if it is not here (any
        more)."""
        self.sessions.drop(request_id)
        samples = self._roster.samples(request_id, index)
        for sequence in samples:
            self._roster.finish(sequence)
        return bool(samples)

    def end_well(self, request_id: RequestId, index: int) -> bool:
        """As ``cancel``, of a sample whose output is complete: what it computed may stay with its session."""
        samples = self._roster.samples(request_id, index)
        for sequence in samples:
            self._roster.finish(sequence, ends_well=True)
        return bool(samples)

    def park(self, request_id: RequestId) -> None:
        """Leave a request out of the coming steps. Slots and pages stay with it until somebody waits for them."""
        self._roster.park(request_id)

    def unpark(self, request_id: RequestId) -> bool:
        """Let a parked request go on; False if it must wait, for its slot and pages are others' by now."""
        self._roster.unpark(request_id)
        return self._roster.is_running(request_id)

    def expire(self, now: float) -> list[SequenceUpdate]:
        """End the requests whose deadline has passed: with what they have, or with DeadlineExceeded if that is nothing; and
        those that would only have begun when there is no time left for their prompt."""
        updates = []
        self.sessions.expire(now)
        for due, request in self._deadlines.passed(now):
            samples = self._roster.live(request)
            assert request.deadline is not None  # it would not be here
            if due < request.deadline and samples[0].num_starts:
                self._deadlines.add(request.deadline, request)
                continue
            if len(samples) == request.num_samples and not any(sequence.num_outputs for sequence in samples):
                left = request.deadline - now
                why = f"{left:.3g} s are left, too little for its prompt" if left > 0 else "it passed before the first token"
                updates.append(self._fail(request, DeadlineExceeded(f"the deadline cannot be met: {why}")))
                continue
            for sequence in samples:
                self._roster.finish(sequence)
                updates.append(_update(sequence, finish_reason=FinishReason.DEADLINE))
        return updates

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do, if nothing happens before."""
        moments = (self._deadlines.next(), self.sessions.next_expiry())
        return min((moment for moment in moments if moment is not None), default=None)

    def estimated_wait_s(self) -> float:
        """How long those who wait now will keep the engine busy, in seconds; 0 before it has run for a while."""
        return estimate_wait(self._clients, self._waiting, self._pace, self._residents)

    def backlogs(self) -> list[list[float]]:
        """What those clients were served that compete: by priority, of each that has requests waiting there."""
        return self._waiting.backlogs()

    def export_state(self, now: float) -> SavedState:
        """What is under way, replayable by ``import_state``."""
        return save(self._roster.sequences.values(), self._waiting.counters(), now)

    def import_state(self, state: SavedState, now: float) -> None:
        """Take over what another scheduler had under way: it is computed again, and goes on greedily."""
        for saved in state.requests:
            self.submit(restored(saved, now))
            for sequence in list(self._roster.sequences[saved.request_id]):
                if sequence.index in saved.outputs:
                    sequence.tokens += saved.outputs[sequence.index]
                else:
                    self._roster.finish(sequence)
            if saved.is_parked:
                self.park(saved.request_id)
        self._waiting.restore({Priority[name.upper()]: counters for name, counters in state.served.items()})

    def reconfigure(self, config: SchedulerConfig) -> None:
        """From the next plan on."""
        self._pace.config = config
        self._waiting.ageing_steps = config.ageing_steps
        self._clients.reconfigure(config)
        self.sessions.reconfigure(config)

    def diagnostics(self) -> SchedulerDiagnostics:
        """In time linear in what is alive."""
        return diagnose(self._clients, self._waiting, self._pace, self._trials, self.estimated_wait_s())

    def statistics(self) -> SchedulerStats:
        """May be called in any thread, which is why the sequences are copied first."""
        cache = self._cache.statistics()
        running = {sequence.request.request_id for sequence in list(self._residents.running)}
        parked = {sequence.request.request_id for sequence in list(self._roster.parked)} - running
        return SchedulerStats(
            running=len(running),
            waiting=len(self._roster.sequences) - len(running) - len(parked),
            parked=len(parked),
            preemptions=self._roster.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=cache.hit_tokens,
            generated_tokens=self._generated_tokens,
            pages=cache.pages,
        )

    # -- the step -----------------------------------------------------------------------------------------------------

    def plan(self, hint: BatchHint) -> BatchPlan | None:
        """The next step, or None when there is nothing to compute."""
        step = StepInput([], [], [], UnifiedBatch([], []))
        entries: list[Entry] = []
        self.sessions.now = hint.now
        self._waiting.age()
        if self._trials:
            self._plan_trial(step, entries, hint.max_tokens)
        else:
            self._make_way()
            preemptions = self._roster.num_preemptions
            self._plan_decodes(step, entries)
            may_admit = self._roster.num_preemptions == preemptions  # else what was freed is owed to those who run
            budget = self._pace.prefill_budget(hint.max_tokens, StepWork.of(step.batch))
            self._plan_prompts(step, entries, budget, may_admit=may_admit)
        for entry in entries:
            if entry.samples:
                self._roster.release_samples(entry.sequence)
        if not step.batch:
            return None
        self._num_batches += 1
        batch_id = BatchId(self._num_batches)
        work = StepWork.of(step.batch)
        if not step.batch.prefills:
            self._plan_rounds(step, entries, min(self._max_rounds, self._pace.num_rounds(work, hint.rounds_s)))
        self.swapping.carry_out(step)
        num_swaps = len(step.swapped_out) + len(step.swapped_in)
        self._in_flight.append(PlannedStep(batch_id, entries, work, num_swaps, step.batch.num_rounds))
        request_ids = [entry.sequence.request.request_id for entry in entries]
        return BatchPlan(batch_id=batch_id, step=step, request_ids=request_ids, preempted=self._roster.take_displaced())

    def commit(self, plan: BatchPlan, output: StepOutput, step_s: float | None = None) -> list[SequenceUpdate]:
        """Take over what a step computed. Only now are its pages published."""
        planned = self._landed(plan)
        outputs: list[DecodeOutput | PrefillOutput] = [*output.decodes, *output.prefills]
        if len(planned.entries) != len(outputs):
            raise EngineFailed(f"the executor returned {len(outputs)} outputs for {len(planned.entries)} inputs")
        if step_s is not None and planned.num_swaps:
            self.swapping.observe(planned.num_swaps, planned.work, step_s)
        elif step_s is not None:
            self._pace.observe(planned.work, step_s / planned.num_rounds)
        updates: list[SequenceUpdate] = []
        served: Counter[tuple[Priority, ClientId]] = Counter()
        for entry, item in zip(planned.entries, outputs, strict=True):
            if entry.is_lost:
                continue  # cancelled, or it ended one step ago: what was computed ahead is dropped
            update, error = self._take(entry, item)
            if update.token_ids:
                served[entry.sequence.priority, entry.sequence.request.client_id] += len(update.token_ids)
            if update.token_ids or update.prompt_scores:
                updates.append(update)
            if error is not None:
                updates.append(self._fail(entry.sequence.request, error))
        if self._roster.sequences:  # else nobody is owed anything
            for (priority, client_id), count in served.items():
                self._waiting.serve(priority, client_id, num_outputs=count)
        return updates

    def fail(self, plan: BatchPlan, error: FerrumError) -> list[SequenceUpdate]:
        """A step could not be run. A request that was in it alone is the cause, and ends; several are computed again, in two
        parts, and so on until it is found: what others generate is what it would have been."""
        requests = {entry.sequence.request.request_id: entry.sequence.request for entry in self._landed(plan).entries}
        alive = [request for request in requests.values() if self._roster.live(request)]
        if len(requests) == 1:
            return [self._fail(request, error) for request in alive]
        # All samples of each, whichever was in the step: those that share its pages have them from there.
        self._trials.split([[one for one in self._roster.live(request) if self._roster.take_back(one)] for request in alive])
        return []

    # -- planning -----------------------------------------------------------------------------------------------------

    def _make_way(self) -> None:
        """Take slots and pages from those who have more than they are entitled to, if somebody waits who has less. Before
        anything is planned: what a step computes it must still have pages for."""
        for _ in range(_MAX_EVICTIONS):
            first = self._waiting.first()
            if first is None or self._residents.would_take_too_much(first):
                return
            if self._residents.has_room_for(first):
                return
            if self._roster.preempt_parked():
                continue
            victim = self._residents.less_entitled(first)
            if victim is None:
                return
            self._roster.preempt(victim)

    def _plan_decodes(self, step: StepInput, entries: list[Entry]) -> None:
        for sequence in list(self._residents.running):
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted for a more urgent one, earlier in this loop
            if not sequence.is_decoding or not sequence.num_unplanned:
                continue
            handle = self._make_room(sequence, step)
            if handle is None or sequence.slot is None:
                continue
            position = sequence.num_planned
            step.batch.decodes.append(DecodeInput(sequence.slot, position))
            sequence.num_planned = position + 1
            sequence.num_pending += 1
            entries.append(Entry(sequence, handle, position, position + 1, True, sequence.num_retries))

    def _plan_rounds(self, step: StepInput, entries: list[Entry], wanted: int) -> None:
        """Decodes that nobody waits behind go on for some rounds, if there are pages for all, and nothing is asked for that
        has to be worked out for each token. To the host that is one step, so a small model is not held up by it."""
        if wanted == 1 or self._waiting or not all(entry.sequence.is_plain for entry in entries):
            return
        rounds = min(wanted, *(1 + entry.sequence.num_unplanned for entry in entries))
        if rounds == 1:
            return
        for entry in entries:
            if not self._grow(entry.sequence, entry.handle, entry.end + rounds - 1, step):
                return
        for entry in entries:
            entry.end += rounds - 1
            entry.sequence.num_planned = entry.end
            entry.sequence.num_pending += rounds - 1
        step.batch.num_rounds = rounds

    def _plan_prompts(self, step: StepInput, entries: list[Entry], budget: int, *, may_admit: bool) -> None:
        """Chunks of prompts that were begun, and of new ones, in the order of their standing."""
        begun = [sequence for sequence in self._residents.running if sequence.num_planned < sequence.prefill_length]
        begun.sort(key=self._waiting.standing, reverse=True)
        without = set[ClientId]()
        while budget > 0:
            first = self._waiting.first(without) if may_admit else None
            if begun and (first is None or self._waiting.standing(begun[-1]) < self._waiting.standing(first)):
                budget -= self._plan_chunk(begun.pop(), step, entries, budget)
            elif first is None:
                return
            elif first.num_pending or self._residents.would_take_too_much(first):
                without.add(first.request.client_id)  # a pending token is that of one preempted just now
            elif self._admit(first, step, entries):
                budget -= self._plan_chunk(first, step, entries, budget)
            else:
                may_admit = False

    def _admit(self, sequence: Sequence, step: StepInput, entries: list[Entry]) -> bool:
        """Give it a slot and pages, if there are any."""
        handle = None
        while handle is None:
            handle = self._claim_pages(sequence, step, entries) if self._residents.has_free_slot else None
            if handle is None and not self._roster.preempt_parked():
                return False
        slot = self._roster.admit(sequence, handle)
        pages, name = list(handle.table.pages), sequence.request.request_id
        step.assigned.append(SlotAssignment(slot, name, sequence.sampling, pages, sequence.history))
        return True

    def _plan_trial(self, step: StepInput, entries: list[Entry], budget: int) -> None:
        """Suspects alone, and one step at a time."""
        if self._in_flight:
            return
        members = self._trials.current()
        for sequence in members:
            while sequence.state is SequenceState.WAITING and not self._admit(sequence, step, entries):
                others = [other for other in self._residents.running if other not in members]
                if not others:
                    return
                self._roster.preempt(others[-1])
            if budget > 0:
                budget -= self._plan_chunk(sequence, step, entries, budget)

    def _claim_pages(self, sequence: Sequence, step: StepInput, entries: list[Entry]) -> KvCacheHandle | None:
        request = sequence.request
        samples = self._roster.sequences[request.request_id]
        too_fresh = {entry.sequence for entry in entries if entry.start < len(request.token_ids)} | self.swapping.arriving
        return claim_pages(self._cache, self.sessions, self.swapping, sequence, samples, too_fresh, step)

    def _plan_chunk(self, sequence: Sequence, step: StepInput, entries: list[Entry], budget: int) -> int:
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
        entries.append(Entry(sequence, handle, start, end, samples, sequence.num_retries))
        return end - start

    def _make_room(self, sequence: Sequence, step: StepInput) -> KvCacheHandle | None:
        """A page for the sequence's next token, preempting the least urgent; None if that was the sequence itself."""
        while (handle := sequence.handle) is not None:
            if self._grow(sequence, handle, sequence.num_planned + 1, step):
                return handle
            if not self._roster.preempt_parked():
                self._roster.preempt(self._residents.running[-1])
        return None

    def _grow(self, sequence: Sequence, handle: KvCacheHandle, num_tokens: int, step: StepInput) -> bool:
        """Pages for so many tokens; False if too few are free."""
        pages, known, slot = handle.table.pages, len(handle.table.pages), sequence.slot
        assert slot is not None  # it has pages, so it has a slot
        if not self._residents.grow(sequence, handle, num_tokens):
            return False
        step.appended += [PageAppend(slot, index, page) for index, page in enumerate(pages[known:], start=known)]
        return True

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def _landed(self, plan: BatchPlan) -> PlannedStep:
        planned = self._in_flight.popleft()
        if planned.batch_id != plan.batch_id:
            raise EngineFailed(f"step {plan.batch_id} was returned before step {planned.batch_id}")
        return planned

    def _take_scores(self, entry: Entry, output: PrefillOutput) -> Items[TokenScores]:
        """Scores of prompt tokens that were not scored before: a prefill may have been cut short and done again."""
        sequence, start = entry.sequence, entry.start
        fresh = output.scores[max(0, sequence.num_scored - start) :]
        sequence.num_scored += len(fresh)
        return fresh

    def _take(self, entry: Entry, item: DecodeOutput | PrefillOutput) -> tuple[SequenceUpdate, FerrumError | None]:
        """What a step brought one sequence, until an end or an error."""
        sequence, update = entry.sequence, _update(entry.sequence)
        rounds: list[SampledToken | None] = [item.sampled]
        if isinstance(item, DecodeOutput):
            rounds += item.later
        for end, sampled in enumerate(rounds, start=entry.end - len(rounds) + 1):
            if sampled is not None and sampled.error is not None:
                return update, sampled.error
            if sequence.handle is entry.handle:  # not preempted since
                self._cache.publish(entry.handle, sequence.tokens, end)
            if isinstance(item, PrefillOutput):
                update.prompt_scores = self._take_scores(entry, item)
            if entry.samples and sampled is not None and sampled.token_id is not None:
                self._append(sequence, sampled.token_id, sampled, update)
            if update.finish_reason is not None:
                break
        return update, None

    def _append(self, sequence: Sequence, token_id: TokenId, sampled: SampledToken, update: SequenceUpdate) -> None:
        sequence.num_pending -= 1
        sequence.tokens.append(token_id)
        sequence.mirostat_mu = sampled.mirostat_mu
        request = sequence.request
        self._generated_tokens += 1
        self._clients[request.client_id].num_generated += 1
        update.token_ids.append(token_id)
        if sampled.scores is not None:
            update.scores = (*update.scores, sampled.scores)
        if token_id in request.stop_token_ids:
            update.finish_reason = FinishReason.STOP
        elif token_id in request.eos_token_ids:
            update.finish_reason = FinishReason.EOS
        elif sequence.num_outputs >= request.max_tokens:
            update.finish_reason = FinishReason.LENGTH
        if update.finish_reason is not None:
            self._pace.ended(sequence.num_outputs)
            self._roster.finish(sequence, ends_well=True)

    def _fail(self, request: SequenceRequest, error: FerrumError) -> SequenceUpdate:
        """End a request with all its samples."""
        self.sessions.drop(request.request_id)
        for sequence in self._roster.live(request):
            if sequence.handle is not None:
                self._cache.unpublish(sequence.handle)  # whatever made it fail may have been in them
            self._roster.finish(sequence)
        return SequenceUpdate(request_id=request.request_id, token_ids=[], error=error)


def _update(sequence: Sequence, finish_reason: FinishReason | None = None) -> SequenceUpdate:
    return SequenceUpdate(
        request_id=sequence.request.request_id,
        index=sequence.index,
        token_ids=[],
        finish_reason=finish_reason,
        num_cached_tokens=sequence.num_cached_tokens,
    )
