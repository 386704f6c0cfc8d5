"""What callers and hosts do with an engine, to be cancelled at each await of it."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec

from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.interfaces.engine import ChunkSink, InferenceEngine
from ferrum_rt.interfaces.errors import Cancelled, DeadlineExceeded
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import ChatMessage, FinishReason, InferenceRequest, RequestId
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.simulation.digests import expected_tokens
from tests.fakes.executor import FakeExecutor, fake_model
from tests.fakes.grammar import FakeGrammarCompiler
from tests.runtime.engines import text_after

REGEX = {"type": "regex", "definition": "abc"}


class CountingRuntime(Runtime):
    """Knows how many requests it took, and which executors were made for it."""

    num_started = 0

    def __init__(self, config: EngineConfig, load_s: float = 0.0, **fake: Any) -> None:
        self.executors: list[FakeExecutor] = []

        def load(config: EngineConfig) -> LoadedModel:
            time.sleep(load_s)  # in the executor's thread
            self.executors.append(FakeExecutor(config, **fake))
            return msgspec.structs.replace(fake_model(config, self.executors[0]), grammars=FakeGrammarCompiler())

        super().__init__(config, load)

    def start(self, request: InferenceRequest, sink: ChunkSink) -> Generation:
        generation = super().start(request, sink)
        self.num_started += 1
        return generation

    def check_nothing_is_under_way(self) -> None:
        """Every request has had its one end, nobody holds a page, and the ledger adds up."""
        counts = self._counts
        assert self.num_started == counts["finished"] + counts["failed"] + counts["cancelled"]
        assert not self._active
        assert self._scheduler.statistics().pages.active == 0
        assert not self._scheduler._roster.sequences
        self._cache.verify()


@dataclass(frozen=True)
class Scenario:
    """What is done with an engine: ``act`` is cancelled. ``config`` and ``fake`` are the engine's."""

    name: str
    act: Callable[[Any], Awaitable[None]]
    config: dict[str, Any] = field(default_factory=dict)
    fake: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    async def act_on(self, engine: Any) -> None:
        await self.act(engine)

    def runtime(self) -> CountingRuntime:
        # Without a prefix cache each run is like the first.
        config = {"kv_cache": {"prefix_caching": False}, **self.config}
        return CountingRuntime(build_config(None, None, config), **self.fake)


# -- callers of an open engine --------------------------------------------------------------------------------------------


async def _text(engine: InferenceEngine) -> None:
    assert (await engine.infer("hello", max_tokens=4)).text == text_after("hello", 4)


async def _tokens(engine: InferenceEngine) -> None:
    assert (await engine.infer(list(b"hello"), max_tokens=4)).text == text_after("hello", 4)


async def _chat(engine: InferenceEngine) -> None:
    await engine.infer([ChatMessage(role="user", content="hello")], max_tokens=3)


async def _grammar(engine: InferenceEngine) -> None:
    await engine.infer("hello", max_tokens=3, response_format=REGEX)


async def _samples(engine: InferenceEngine) -> None:
    response = await engine.infer("hello", n=3, max_tokens=3)
    for output in response.outputs:
        assert output.token_ids == expected_tokens(b"hello", 3, sample=output.index)


async def _batch(engine: InferenceEngine) -> None:
    results = await engine.infer_batch([f"{number}" for number in range(6)], max_tokens=2)
    assert [getattr(result, "text", None) for result in results] == [text_after(f"{number}", 2) for number in range(6)]


async def _stream(engine: InferenceEngine) -> None:
    async with engine.infer_stream("hello", max_tokens=6) as chunks:
        assert "".join([chunk.text async for chunk in chunks]) == text_after("hello", 6)


async def _slow_reader(engine: Runtime) -> None:
    async with engine.infer_stream("slow", max_tokens=12) as chunks:
        text = (await anext(aiter(chunks))).text
        with anyio.fail_after(10):
            while engine.metrics().scheduler.parked == 0:  # noqa: ASYNC110 - nobody sets an event
                await anyio.sleep(0.0005)
        async for chunk in chunks:
            text += chunk.text
    assert text == text_after("slow", 12)


async def _deadline(engine: InferenceEngine) -> None:
    with suppress(DeadlineExceeded):  # on a busy machine
        await engine.infer("late", max_tokens=1000, deadline_s=0.004)


async def _blocked_past_a_deadline(engine: InferenceEngine) -> None:
    """The host keeps the event loop until steps have ended and the deadline has passed."""
    async with engine.infer_stream("late", max_tokens=1000, deadline_s=0.009) as chunks:
        with suppress(DeadlineExceeded):  # on a busy machine
            await anext(aiter(chunks))
        time.sleep(0.012)  # noqa: ASYNC251 - that is the fault
        async for chunk in chunks:
            assert chunk.finish_reason in (None, FinishReason.DEADLINE)


async def _two_in_few_pages(engine: InferenceEngine) -> None:
    results = await engine.infer_batch(["one", "two"], max_tokens=10)
    assert [getattr(result, "text", None) for result in results] == [text_after(text, 10) for text in ("one", "two")]


_SMALL = {"scheduler": {"max_running_requests": 2}}
CALLERS = [
    Scenario("text", _text),
    Scenario("tokens", _tokens),
    Scenario("chat", _chat),
    Scenario("grammar", _grammar),
    Scenario("n samples", _samples),
    Scenario("batch", _batch, _SMALL),
    Scenario("stream", _stream),
    Scenario("slow reader", _slow_reader, {"batching": {"stream_capacity": 2}}),
    Scenario("deadline", _deadline, fake={"step_s": 0.001}),
    Scenario("blocked past a deadline", _blocked_past_a_deadline, fake={"step_s": 0.001}),
    Scenario("chunks of a prompt", _text, {"batching": {"max_batched_tokens": 2}, **_SMALL}),
    Scenario(
        "preemption",
        _two_in_few_pages,
        {"kv_cache": {"num_pages": 5, "block_size": 4, "prefix_caching": False}, **_SMALL},
    ),
]


# -- hosts that open one --------------------------------------------------------------------------------------------------


async def _life(engine: CountingRuntime) -> None:
    async with engine:
        await _text(engine)


async def _shutdown_while_busy(engine: CountingRuntime) -> None:
    async with anyio.create_task_group() as tasks:
        async with engine:
            tasks.start_soon(_refused_or_served, engine)
            tasks.start_soon(_refused_or_served, engine)
            async with engine.infer_stream("mine", max_tokens=4) as chunks:
                await anext(aiter(chunks))
            await engine.shutdown()


async def _refused_or_served(engine: InferenceEngine) -> None:
    with suppress(Cancelled):
        await _text(engine)


async def _leave_while_busy(engine: CountingRuntime) -> None:
    async with anyio.create_task_group() as tasks:
        async with engine:
            tasks.start_soon(_refused_or_served, engine)
            async with engine.infer_stream("mine", max_tokens=2) as chunks:
                await anext(aiter(chunks))


async def _many_updates(engine: CountingRuntime) -> None:
    """More in one step than the detokenizer turns into text in one go, where that is less than usual."""
    async with engine:
        everybody = _Everybody(6)
        for number in range(everybody.num_left):
            engine.start(build_request([65], {"max_tokens": 3, "id": RequestId(f"{number}")}), everybody)
        await everybody.has_ended.wait()


class _Everybody:
    """A sink for many requests."""

    is_full = False

    def __init__(self, num_left: int) -> None:
        self.num_left, self.has_ended = num_left, anyio.Event()

    def put(self, item: object) -> None:
        pass

    def close(self) -> None:
        self.num_left -= 1
        if not self.num_left:
            self.has_ended.set()


async def _grammar_life(engine: CountingRuntime) -> None:
    async with engine:
        await _grammar(engine)


async def _fails(engine: CountingRuntime) -> None:
    try:
        async with engine:
            async with engine.infer_stream("mine", max_tokens=500) as chunks:
                await anext(aiter(chunks))
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass


async def _blocks_past_a_deadline(engine: CountingRuntime) -> None:
    async with engine:
        await _blocked_past_a_deadline(engine)


HOSTS = [
    Scenario("life", _life),
    Scenario("grammar", _grammar_life),
    Scenario("close while loading", _life, fake={"load_s": 0.005}),
    Scenario("shutdown while busy", _shutdown_while_busy, fake={"step_s": 0.001}),
    Scenario("a host that fails", _fails, fake={"step_s": 0.001}),
    Scenario(
        "many updates",
        _many_updates,
    ),
    Scenario("blocked past a deadline", _blocks_past_a_deadline, fake={"step_s": 0.001}),
    Scenario("leave while busy", _leave_while_busy, fake={"step_s": 0.001}),
]
