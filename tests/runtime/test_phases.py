"""The spans of a request's phases: one upon the other from admission to end, whatever becomes of it. And those of steps."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from ferrum_rt.interfaces import telemetry as names
from ferrum_rt.interfaces.errors import BackendError, Cancelled, DeadlineExceeded, FerrumError, RequestValidationError
from ferrum_rt.interfaces.telemetry import Phase
from ferrum_rt.interfaces.types import RequestId, StreamChunk
from ferrum_rt.load.results import SpanRecord
from ferrum_rt.load.spans import RequestTree, SpanRecorder, faults, request_trees
from ferrum_rt.runtime import step_trace, tracing
from ferrum_rt.runtime.runtime import Runtime
from tests.runtime.engines import fake_engine, until

QUEUE, PREFILL, DECODE, PARKED, PREEMPTED = Phase
ONE_SLOT = {"scheduler": {"max_running_requests": 1}}
SLOW_READERS = {"batching": {"stream_capacity": 2}}
# Two requests of 20 tokens have room beside each other, but not to their ends.
FEW_PAGES = {"kv_cache": {"num_pages": 7, "block_size": 4, "prefix_caching": False}}

# What may follow what. What was computed before a
# preemption may arrive after it, and find its reader slow.
FOLLOWERS = {
    QUEUE: {PREFILL},
    PREFILL: {DECODE, PARKED, PREEMPTED},
    DECODE: {PARKED, PREEMPTED},
    PARKED: {DECODE, PREEMPTED},
    PREEMPTED: {PREFILL, PARKED},
}


def record(patch: pytest.MonkeyPatch, **provider: Any) -> SpanRecorder:
    """Gathers the spans of requests and of steps; the process's own provider is left alone."""
    recorder = SpanRecorder()
    provided = TracerProvider(shutdown_on_exit=False, **provider)
    provided.add_span_processor(recorder)
    for module in (tracing, step_trace):
        patch.setattr(module, "_TRACER", provided.get_tracer("test"))
    return recorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SpanRecorder:
    return record(monkeypatch)


def trees(recorder: SpanRecorder) -> list[RequestTree]:
    """Those of the requests that have ended, which must be whole to the nanosecond."""
    found = request_trees(recorder.take())
    for tree in found:
        assert list(faults(tree, tolerance=0.0)) == []
        phases = phases_of(tree)
        assert all(phase in FOLLOWERS[before] for before, phase in pairwise(phases)), phases
    return found


def phases_of(tree: RequestTree) -> list[Phase]:
    return [Phase(phase.name) for phase in tree.phases]


async def rest(chunks: AsyncIterator[StreamChunk]) -> None:
    async for _ in chunks:
        pass


def is_in(engine: Runtime, phase: Phase) -> Callable[[], bool]:
    """One of its requests is."""
    return lambda: any(generation.trace._phase is phase for generation in engine._active.values())


# -- whatever becomes of it -----------------------------------------------------------------------------------------------


async def test_a_request_waits_and_is_computed(recorder: SpanRecorder) -> None:
    """Queue, prefill and decode, which begins with the first token."""
    async with fake_engine(step_s=0.001) as (engine, _):
        response = await engine.infer("hello", max_tokens=8)
    [tree] = trees(recorder)
    assert phases_of(tree) == [QUEUE, PREFILL, DECODE]
    assert response.metrics is not None
    decode_s, prefill_s = ((phase.start_ns - tree.root.start_ns) / 1e9 for phase in (tree.phases[2], tree.phases[1]))
    assert decode_s == pytest.approx(response.metrics.ttft_s, abs=1e-6)
    assert prefill_s == pytest.approx(response.metrics.queue_s, abs=1e-6)
    assert (tree.root.end_ns - tree.root.start_ns) / 1e9 == pytest.approx(response.metrics.total_s, abs=1e-6)
    assert tree.root.attributes[names.TIME_TO_FIRST_CHUNK] == pytest.approx(response.metrics.ttft_s, abs=1e-6)


async def test_chunks_of_a_prompt_are_events(recorder: SpanRecorder) -> None:
    """Each with its place in the prompt, in their order; together they are the prompt."""
    async with fake_engine({"batching": {"max_batched_tokens": 3}, **ONE_SLOT}) as (engine, _):
        await engine.infer("hello you", max_tokens=2)
    [tree] = trees(recorder)
    events = [event for phase in tree.phases for event in phase.events]
    assert {name for name, _, _ in events} == {names.CHUNK_EVENT}
    assert [(told[names.CHUNK_POSITION], told[names.CHUNK_TOKENS]) for _, _, told in events] == [(0, 3), (3, 3), (6, 3)]
    assert [phase.name for phase in tree.phases if phase.events] == [PREFILL]
    times = [at for _, at, _ in events]
    assert tree.phases[1].start_ns <= times[0] <= times[-1] <= tree.phases[1].end_ns


async def test_a_slow_reader_parks(recorder: SpanRecorder) -> None:
    """While its reader sleeps the request is parked, and decodes again when it reads on."""
    async with fake_engine(SLOW_READERS) as (engine, _):
        async with engine.infer_stream("slow", max_tokens=12) as chunks:
            await until(is_in(engine, PARKED))
            await rest(chunks)
    [tree] = trees(recorder)
    assert phases_of(tree)[:5] == [QUEUE, PREFILL, DECODE, PARKED, DECODE]


async def test_who_loses_his_pages_is_preempted(recorder: SpanRecorder) -> None:
    """He waits, is computed once more, and goes on; as often as the scheduler has counted."""
    async with fake_engine(FEW_PAGES) as (engine, _):
        await engine.infer_batch(["one", "two"], max_tokens=18)
        preemptions = engine.metrics().scheduler.preemptions
    found = [phases_of(tree) for tree in trees(recorder)]
    assert preemptions
    assert sum(phases.count(PREEMPTED) for phases in found) == preemptions
    [longest] = [phases for phases in found if PREEMPTED in phases][:1]
    assert longest[:6] == [QUEUE, PREFILL, DECODE, PREEMPTED, PREFILL, DECODE]


async def test_who_is_parked_may_lose_his_pages(recorder: SpanRecorder) -> None:
    """He is parked all the while, and then must wait for a slot like one who was preempted."""
    async with fake_engine(SLOW_READERS | ONE_SLOT) as (engine, _):
        async with engine.infer_stream("slow", max_tokens=12) as chunks:
            await until(is_in(engine, PARKED))
            await engine.infer("quick", max_tokens=3)
            await rest(chunks)
    slow, quick = trees(recorder)
    assert phases_of(slow)[:7] == [QUEUE, PREFILL, DECODE, PARKED, PREEMPTED, PREFILL, DECODE]
    assert phases_of(quick) == [QUEUE, PREFILL, DECODE]


@pytest.mark.parametrize("num_slots", [1, 2, 8])
async def test_several_samples_are_one_request(recorder: SpanRecorder, num_slots: int) -> None:
    """However few of them can run at a time."""
    async with fake_engine({"scheduler": {"max_running_requests": num_slots}}) as (engine, _):
        await engine.infer("samples", n=4, max_tokens=5)
    [tree] = trees(recorder)
    assert phases_of(tree)[:2] == [QUEUE, PREFILL]
    assert phases_of(tree)[-1] == DECODE
    assert tree.root.attributes[names.OUTPUT_TOKENS] == 20


async def test_rounds_are_one_decode(recorder: SpanRecorder) -> None:
    """Steps of several tokens change nothing."""
    async with fake_engine(max_rounds=8, step_s=0.0005) as (engine, _):
        await engine.infer("rounds", max_tokens=200)
    assert [phases_of(tree) for tree in trees(recorder)] == [[QUEUE, PREFILL, DECODE]]


@pytest.mark.parametrize(
    ("prompt", "fake", "kind", "phases"),
    [
        ("fails", {"fail_at": {1}}, BackendError, [QUEUE, PREFILL]),
        ("fails", {"fail_at": {4}}, BackendError, [QUEUE, PREFILL, DECODE]),
        ("nan", {"nan_requests": {RequestId("mine")}}, BackendError, [QUEUE, PREFILL]),
        ("x" * 2000, {}, RequestValidationError, [QUEUE]),
    ],
    ids=["first step", "fourth step", "NaN", "too long"],
)
async def test_failures(
    recorder: SpanRecorder, prompt: str, fake: Any, kind: type[FerrumError], phases: list[Phase]
) -> None:
    """What was begun is ended, with the request's span, which has the error's code."""
    async with fake_engine(**fake) as (engine, _):
        with pytest.raises(kind):
            await engine.infer(prompt, max_tokens=20, id=RequestId("mine"))
    [tree] = trees(recorder)
    assert phases_of(tree) == phases
    assert tree.root.is_error
    assert tree.root.attributes[names.ERROR_TYPE] == kind.code


async def test_a_step_that_fails_takes_back_those_who_are_not_its_cause(recorder: SpanRecorder) -> None:
    """They wait for each other, run again, and end as they would have."""
    async with fake_engine(fail_at={3}) as (engine, _):
        await engine.infer_batch(["one", "two", "three"], max_tokens=10)
    found = trees(recorder)
    assert not any(tree.root.is_error for tree in found)
    assert any(PREEMPTED in phases_of(tree) for tree in found)


@asynccontextmanager
async def in_phase(phase: Phase) -> AsyncIterator[tuple[Runtime, anyio.CancelScope]]:
    """A request that is in this phase, in a scope of its own."""
    config, fake = {
        QUEUE: (ONE_SLOT, {"step_s": 0.001}),
        PREFILL: ({}, {"step_s": 0.1}),
        DECODE: ({}, {"step_s": 0.001}),
        PARKED: (SLOW_READERS, {}),
        PREEMPTED: (FEW_PAGES, {"step_s": 0.001}),
    }[phase]

    async def one(engine: Runtime, prompt: str, max_tokens: int) -> None:
        async with engine.infer_stream(prompt, max_tokens=max_tokens) as chunks:
            with suppress(Cancelled):
                await (anyio.sleep_forever() if phase is PARKED else rest(chunks))
            await anyio.sleep_forever()

    async with fake_engine(config, **fake) as (engine, _), anyio.create_task_group() as tasks:
        if phase in (QUEUE, PREEMPTED):
            tasks.start_soon(one, engine, "other", 18 if phase is PREEMPTED else 900)
            await until(is_in(engine, DECODE))
        tasks.start_soon(one, engine, "mine", 18 if phase is PREEMPTED else 900)
        await until(is_in(engine, phase))
        yield engine, tasks.cancel_scope


@pytest.mark.parametrize("phase", Phase)
async def test_cancelled_in_each_phase(recorder: SpanRecorder, phase: Phase) -> None:
    """The phase ends with the request, where that was cancelled."""
    async with in_phase(phase) as (engine, scope):
        scope.cancel()
    ends = [phases_of(tree)[-1] for tree in trees(recorder)]
    assert phase in ends
    assert engine.status_now().requests.cancelled == len(ends)


@pytest.mark.parametrize("phase", Phase)
async def test_an_engine_that_is_closed_ends_them_all(recorder: SpanRecorder, phase: Phase) -> None:
    """As errors, whose code says why."""
    async with in_phase(phase) as (engine, scope):
        engine._stop()
        scope.cancel()
    found = trees(recorder)
    assert phase in [phases_of(tree)[-1] for tree in found]
    assert {tree.root.attributes[names.ERROR_TYPE] for tree in found} == {"cancelled"}


async def test_deadlines(recorder: SpanRecorder) -> None:
    """One that passes in the queue, or before the first token, is an error; after it, a reason to end."""
    async with fake_engine(ONE_SLOT, step_s=0.002) as (engine, _):
        await engine.infer("decodes", max_tokens=900, deadline_s=0.05)
        async with engine.infer_stream("first", max_tokens=900) as chunks:
            await anext(aiter(chunks))
            with pytest.raises(DeadlineExceeded):
                await engine.infer("waits", max_tokens=9, deadline_s=0.02)
    async with fake_engine({"batching": {"max_batched_tokens": 2}, **ONE_SLOT}, step_s=0.002) as (engine, _):
        with pytest.raises(DeadlineExceeded):
            await engine.infer("begins" * 50, max_tokens=9, deadline_s=0.02)
    decodes, first, waits, begins = trees(recorder)
    assert phases_of(decodes) == [QUEUE, PREFILL, DECODE]
    assert (decodes.root.attributes[names.FINISH_REASONS], decodes.root.is_error) == (("deadline",), False)
    assert phases_of(first) == [QUEUE, PREFILL, DECODE]
    assert (phases_of(waits), waits.root.attributes[names.ERROR_TYPE]) == ([QUEUE], "deadline_exceeded")
    assert (phases_of(begins), begins.root.attributes[names.ERROR_TYPE]) == ([QUEUE, PREFILL], "deadline_exceeded")


# -- on random schedules --------------------------------------------------------------------------------------------------

requests = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 30),
        "max_tokens": st.integers(1, 25),
        "n": st.sampled_from([1, 1, 1, 3]),
        "priority": st.sampled_from(["low", "normal", "high"]),
        "client": st.sampled_from(["a", "b"]),
        "begins_after": st.integers(0, 30),
        "reads": st.integers(0, 40),
        "pause": st.sampled_from([0, 0, 1, 20]),
    }
)
engines = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 4),
        "pages": st.integers(30, 60),
        "budget": st.integers(4, 40),
        "capacity": st.integers(1, 6),
        "rounds": st.sampled_from([1, 4]),
        "fail_at": st.sets(st.integers(1, 40), max_size=3),
    }
)


async def _run(plan: dict[str, Any], wanted: list[dict[str, Any]]) -> int:
    """Returns how many were admitted."""
    config = {
        "scheduler": {"max_running_requests": plan["slots"], "max_waiting_requests": 6},
        "kv_cache": {"num_pages": plan["pages"], "block_size": 2},
        "batching": {"max_batched_tokens": max(plan["budget"], plan["slots"]), "stream_capacity": plan["capacity"]},
    }

    async def one(engine: Runtime, request: dict[str, Any]) -> None:
        for _ in range(request["begins_after"]):
            await anyio.lowlevel.checkpoint()
        fields = {name: request[name] for name in ("max_tokens", "n", "priority")}
        try:
            stream = engine.infer_stream(list(range(1, request["prompt"] + 1)), client_id=request["client"], **fields)
            async with stream as chunks:
                for _ in range(request["reads"]):  # then it leaves, whatever there is left
                    for _ in range(request["pause"]):
                        await anyio.lowlevel.checkpoint()
                    await anext(aiter(chunks))
        except (FerrumError, StopAsyncIteration):
            pass

    async with fake_engine(config, fail_at=plan["fail_at"], max_rounds=plan["rounds"]) as (engine, _):
        async with anyio.create_task_group() as tasks:
            for request in wanted:
                tasks.start_soon(one, engine, request)
        counts = engine.status_now().requests
        assert not engine._active
    return counts.finished + counts.failed + counts.cancelled


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(plan=engines, wanted=st.lists(requests, min_size=1, max_size=8))
def test_random_schedules(plan: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    """Slots, pages, slow readers, steps that fail and callers that leave in any combination: each request that was admitted
    has one whole tree."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = record(patch)
        num_admitted = anyio.run(_run, plan, wanted)
        assert len(trees(recorder)) == num_admitted


# -- steps ----------------------------------------------------------------------------------------------------------------


def steps_of(spans: list[SpanRecord]) -> Iterator[SpanRecord]:
    return (span for span in spans if span.name == names.STEP)


async def test_a_steps_span_links_to_the_requests_in_it(recorder: SpanRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once, however many of its samples are in the step; in a trace of its own, whatever span is current where
    the engine is opened; and what it says of the batch is so."""
    monkeypatch.setattr(step_trace, "STEP_SPAN_EVERY_S", 0.0)
    parent = trace.NonRecordingSpan(
        trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
    )
    with trace.use_span(parent):
        async with fake_engine() as (engine, executor):
            await engine.infer_batch(["one", "two"], max_tokens=5)
            await engine.infer("samples", n=2, max_tokens=5)
    spans = recorder.take()
    roots = {tree.root.span_id: tree.root for tree in request_trees(spans)}
    steps = list(steps_of(spans))
    assert len(steps) == executor.num_steps == engine.metrics().steps
    linked = [set(step.links) for step in steps]
    assert all(len(step.links) == len(ids) for step, ids in zip(steps, linked, strict=True))
    assert set().union(*linked) == set(roots)
    for root in roots.values():
        assert sum(root.span_id in ids for ids in linked) >= 5
    for step in steps:
        assert step.parent_id is None
        assert step.trace_id not in {root.trace_id for root in roots.values()}
    assert len({step.trace_id for step in steps}) == len(steps)
    told = steps[0].attributes
    assert (told[names.STEP_PREFILLS], told[names.STEP_DECODES]) == (len(steps[0].links), 0)
    assert sum(int(str(step.attributes[names.STEP_PREFILL_TOKENS])) for step in steps) >= len("onetwosamples")


async def test_so_many_steps_a_second_have_spans(recorder: SpanRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has, and then none for as long as is to lie between them."""
    monkeypatch.setattr(step_trace, "STEP_SPAN_EVERY_S", 3600.0)
    async with fake_engine() as (engine, executor):
        await engine.infer("many steps", max_tokens=50)
    assert executor.num_steps >= 50
    assert len(list(steps_of(recorder.take()))) == 1


# -- nothing --------------------------------------------------------------------------------------------------------------


class Counting:
    """Counts the spans that are asked of another tracer."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer, self.num_started = tracer, 0

    def start_span(self, *arguments: Any, **named: Any) -> trace.Span:
        self.num_started += 1
        return self._tracer.start_span(*arguments, **named)


UNSAMPLED = trace.NonRecordingSpan(trace.SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=trace.TraceFlags(0)))


@pytest.mark.parametrize("kind", ["sampler", "caller", "no SDK"])
async def test_what_is_not_sampled_is_not_recorded(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """By the host's sampler, by the caller's decision, or since there is no SDK: one span is asked for, and nothing is
    worked out for it, no phase and no link."""
    recorder = record(monkeypatch, **({"sampler": ALWAYS_OFF} if kind == "sampler" else {}))
    if kind == "no SDK":
        monkeypatch.setattr(tracing, "_TRACER", trace.NoOpTracer())
    counting = Counting(tracing._TRACER)
    monkeypatch.setattr(tracing, "_TRACER", counting)
    described = False

    def describe(*_: object) -> dict[str, object]:
        nonlocal described
        described = True
        return {}

    monkeypatch.setattr(tracing, "_described", describe)
    current = trace.use_span(UNSAMPLED) if kind == "caller" else trace.use_span(trace.INVALID_SPAN)
    with current:
        async with fake_engine() as (engine, _):
            async with engine.infer_stream("x", max_tokens=5) as chunks:
                [generation] = engine._active.values()
                assert not generation.trace.is_recording
                assert generation.trace.link is None
                await rest(chunks)
    assert counting.num_started == 1
    assert not described
    assert kind != "sampler" or recorder.take() == []


async def test_requests_in_one_step_that_are_sampled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step links to those requests alone that are recorded."""
    recorder = record(monkeypatch)
    monkeypatch.setattr(step_trace, "STEP_SPAN_EVERY_S", 0.0)
    async with fake_engine(step_s=0.001) as (engine, _), anyio.create_task_group() as tasks:
        with trace.use_span(UNSAMPLED):
            tasks.start_soon(partial(engine.infer, "unsampled", max_tokens=20))
        tasks.start_soon(partial(engine.infer, "sampled", max_tokens=20))
    spans = recorder.take()
    [tree] = request_trees(spans)
    assert {link for step in steps_of(spans) for link in step.links} == {tree.root.span_id}
