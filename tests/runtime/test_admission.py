"""Requests that are cancelled while they wait still stand in the queues: those stay bounded, and only the next one pays."""

import threading
from collections.abc import Iterator

import msgspec
import pytest

from ferrum_rt import EngineConfig, ResourceExhausted
from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import ResponseFormat, StreamChunk
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.executor import FakeExecutor, fake_model
from tests.fakes.grammar import FakeGrammar, FakeGrammarCompiler
from tests.runtime.engines import text_after, until


class SlowCompiler(FakeGrammarCompiler):
    """Waits at its gate for each grammar."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def compile(self, response_format: ResponseFormat) -> FakeGrammar:
        assert self.gate.wait(10)
        return super().compile(response_format)


class Sink:
    is_full = False

    def __init__(self) -> None:
        self.items: list[StreamChunk | FerrumError] = []
        self.is_closed = False

    def put(self, item: StreamChunk | FerrumError) -> None:
        self.items.append(item)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def compiler() -> Iterator[SlowCompiler]:
    slow = SlowCompiler()
    yield slow
    slow.gate.set()


async def test_a_compilers_queue_full_of_cancelled_requests_fails_the_next(compiler: SlowCompiler) -> None:
    """The next with a grammar gets ResourceExhausted, one without is served meanwhile, the engine lives, and each cancelled
    one says that it is queued until the compiler has come to it."""
    config = build_config(None, None, {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 3}})

    def load(config: EngineConfig) -> LoadedModel:
        return msgspec.structs.replace(fake_model(config, FakeExecutor(config)), grammars=compiler)

    async with Runtime(config, load) as engine:

        def start() -> tuple[Generation, Sink]:
            form = {"type": "regex", "definition": "abc"}
            sink = Sink()
            return engine.start(build_request("x", {"response_format": form}), sink), sink

        cancelled = []
        for _ in range(5):  # one that is being compiled, and four behind it
            generation, _ = start()
            await until(lambda: not engine._preparation.num_queued)
            assert (await engine.infer("plain", max_tokens=5)).text == text_after("plain", 5)
            engine.abandon(generation)
            cancelled.append(generation)
        _, sink = start()
        await until(lambda: sink.is_closed)
        [error] = sink.items
        assert isinstance(error, ResourceExhausted)
        assert [generation.is_queued for generation in cancelled] == [True] * 5
        assert (await engine.health_check()).healthy
        compiler.gate.set()
        await until(lambda: not any(generation.is_queued for generation in cancelled))
        assert compiler.num_compiled == 1  # those that had ended were passed over
        await engine.infer("x", max_tokens=3, response_format={"type": "regex", "definition": "abc"})
        assert compiler.num_compiled == 2
