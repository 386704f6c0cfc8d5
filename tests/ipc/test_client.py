"""The engine interface: one suite for the engine in this process and for a client of a daemon in a process of its own."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.errors import (
    BackendError,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    NotFound,
    RequestValidationError,
    ResourceExhausted,
    Unsupported,
)
from ferrum_rt.interfaces.types import (
    ChatMessage,
    ClientId,
    EngineState,
    EngineStatus,
    FinishReason,
    InferenceRequest,
    InferenceResponse,
    ModelId,
    RequestId,
    SamplingParams,
    SessionId,
    StreamChunk,
    TokenId,
)
from ferrum_rt.ipc.client import CREDIT, connect
from ferrum_rt.runtime.runtime import Runtime
from tests.daemon.serving import daemon
from tests.fakes.daemon import forked_daemon
from tests.runtime.engines import fake_engine, text_after, until


@asynccontextmanager
async def opened(kind: str, tmp_path: Path, **fake: Any) -> AsyncIterator[InferenceEngine]:
    """The engine as its callers have it."""
    if kind == "in-process":
        async with fake_engine(**fake) as (engine, _):
            yield engine
        return
    async with forked_daemon(tmp_path / "s.sock", **fake), connect(tmp_path / "s.sock") as client:
        yield client


async def settled(engine: InferenceEngine, condition: Callable[[EngineStatus], bool]) -> EngineStatus:
    """The engine's status once ``condition`` holds."""
    with anyio.fail_after(10):
        while not condition(status := await engine.status()):
            await anyio.lowlevel.checkpoint()
    return status


both = pytest.mark.parametrize("kind", ["in-process", "client"])


@both
async def test_a_response_is_the_whole_answer(kind: str, tmp_path: Path) -> None:
    """infer gives text, tokens, usage, reason, seed and times."""
    async with opened(kind, tmp_path) as engine:
        response = await engine.infer("hello", max_tokens=20, id=RequestId("mine"), seed=7)
    assert (response.request_id, response.text, response.seed) == ("mine", text_after("hello", 20), 7)
    assert response.finish_reason is FinishReason.LENGTH
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (5, 20)
    assert response.metrics is not None
    assert 0 <= response.metrics.queue_s <= response.metrics.ttft_s <= response.metrics.total_s


@both
async def test_prompts_are_text_tokens_or_messages(kind: str, tmp_path: Path) -> None:
    """Each kind of prompt is answered as what it is; a request made beforehand goes the same way."""
    async with opened(kind, tmp_path) as engine:
        tokens = await engine.infer([TokenId(byte) for byte in b"hello"], max_tokens=5)
        chat = await engine.infer([ChatMessage(role="user", content="hello")], max_tokens=5)
        request = InferenceRequest(prompt="hello", sampling_params=SamplingParams(max_tokens=5))
        assert (await engine.infer(request)).text == tokens.text == text_after("hello", 5)
        assert chat.text == text_after("user: hello\nassistant: ", 5)


@both
async def test_an_id_is_one_requests_at_a_time(kind: str, tmp_path: Path) -> None:
    """An id that is under way is refused, and free again afterwards."""
    async with opened(kind, tmp_path, step_s=0.001) as engine:
        async with engine.infer_stream("x", id=RequestId("mine"), max_tokens=900) as chunks:
            await anext(chunks)
            with pytest.raises(RequestValidationError, match="mine"):
                await engine.infer("y", id=RequestId("mine"))
        assert (await engine.infer("y", id=RequestId("mine"), max_tokens=3)).text == text_after("y", 3)


@both
async def test_a_full_engine_says_when_to_come_again(kind: str, tmp_path: Path) -> None:
    """One request more than the engine takes is refused with retry_after; the others are answered."""
    full = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with opened(kind, tmp_path, step_s=0.001, config=full) as engine:
        async with engine.infer_stream("x", max_tokens=500) as first, engine.infer_stream("y", max_tokens=3) as second:
            await anext(first)
            with pytest.raises(ResourceExhausted) as refused:
                await engine.infer("z")
            assert refused.value.retry_after > 0
            assert len([chunk async for chunk in first]) > 1
            assert len([chunk async for chunk in second]) > 1


@both
async def test_after_its_end_an_engine_takes_nothing(kind: str, tmp_path: Path) -> None:
    """After shutdown every call is Cancelled, and shutting down again is nothing."""
    async with opened(kind, tmp_path) as engine:
        await engine.shutdown()
        await engine.shutdown()
        with pytest.raises(Cancelled):
            await engine.infer("x")
        with pytest.raises(Cancelled):
            await engine.end_session(SessionId("s"))
        with pytest.raises(Cancelled):
            await engine.fork_session(SessionId("s"), SessionId("t"))


@both
async def test_several_outputs_come_apart(kind: str, tmp_path: Path) -> None:
    """n samples are n outputs."""
    async with opened(kind, tmp_path) as engine:
        response = await engine.infer("x", n=3, max_tokens=5)
    assert [output.index for output in response.outputs] == [0, 1, 2]
    assert len({output.text for output in response.outputs}) == 3


@both
async def test_a_stream_adds_up_to_the_answer(kind: str, tmp_path: Path) -> None:
    """Chunks come in order, more of them than any credit or capacity, and the last has the reason."""
    async with opened(kind, tmp_path) as engine:
        async with engine.infer_stream("stream", max_tokens=5 * CREDIT) as chunks:
            received = [chunk async for chunk in chunks]
    assert "".join(chunk.text for chunk in received) == text_after("stream", 5 * CREDIT)
    assert [chunk.finish_reason is not None for chunk in received] == [False] * (len(received) - 1) + [True]


@both
async def test_a_slow_reader_parks_its_own_request(kind: str, tmp_path: Path) -> None:
    """A reader that stops is parked and others are answered; when it reads on it gets everything."""
    async with opened(kind, tmp_path) as engine:
        async with engine.infer_stream("slow", max_tokens=600) as chunks:
            first = await anext(chunks)
            await settled(engine, lambda status: status.requests.parked == 1)
            assert (await engine.infer("quick", max_tokens=9)).text == text_after("quick", 9)
            rest = [chunk async for chunk in chunks]
    assert first.text + "".join(chunk.text for chunk in rest) == text_after("slow", 600)


@both
@pytest.mark.parametrize("at", [0, 1, 3, 10, 30])
async def test_cancelling_the_task_cancels_the_request(kind: str, tmp_path: Path, at: int) -> None:
    """Whenever the caller's task is cancelled, the request is gone and so are its pages."""
    async with opened(kind, tmp_path, step_s=0.001) as engine:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: engine.infer("x", max_tokens=900))
            for _ in range(at):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        await settled(engine, lambda status: not (status.pages.active or status.requests.running))
        assert (await engine.infer("y", max_tokens=3)).text == text_after("y", 3)


async def fail_within(engine: InferenceEngine) -> None:
    async with engine.infer_stream("x", max_tokens=900) as chunks:
        await anext(chunks)
        raise ZeroDivisionError


@both
async def test_leaving_a_stream_cancels_the_rest(kind: str, tmp_path: Path) -> None:
    """The block of infer_stream is the request's life; an error of the caller's in it comes out as it is."""
    async with opened(kind, tmp_path, step_s=0.001) as engine:
        with pytest.raises(ZeroDivisionError):
            await fail_within(engine)
        assert (await settled(engine, lambda status: status.requests.cancelled == 1)).pages.active == 0


@both
async def test_errors_are_of_the_same_class(kind: str, tmp_path: Path) -> None:
    """What is wrong with a request is raised as the engine raises it."""
    async with opened(kind, tmp_path, fail_at=[1]) as engine:
        with pytest.raises(TypeError, match="max_tokens"):
            await engine.infer("x", max_tokenz=3)  # type: ignore[call-arg]
        with pytest.raises(RequestValidationError, match="temperature"):
            await engine.infer("x", temperature=-1)
        with pytest.raises(NotFound, match="model_id"):
            await engine.infer("x", model_id=ModelId("another"))
        with pytest.raises(RequestValidationError, match="max_model_len"):
            await engine.infer("x" * 2000, max_tokens=10)
        with pytest.raises(BackendError, match="told to fail"):
            await engine.infer("x")


@both
async def test_a_deadline_ends_a_request(kind: str, tmp_path: Path) -> None:
    """With output the output ends there; without any it is DeadlineExceeded."""
    async with opened(kind, tmp_path, step_s=0.005) as engine:
        response = await engine.infer("x", max_tokens=900, deadline_s=0.1)
        assert response.finish_reason is FinishReason.DEADLINE
        with pytest.raises(DeadlineExceeded):
            await engine.infer("x", max_tokens=900, deadline_s=1e-6)


@both
async def test_a_batch_gives_a_result_for_each(kind: str, tmp_path: Path) -> None:
    """Answers and errors in the order of the prompts, of more prompts than run at once."""
    prompts: list[Any] = [f"{n}" for n in range(300)]
    prompts[7] = [10**6]
    async with opened(kind, tmp_path) as engine:
        results = await engine.infer_batch(prompts, max_tokens=4)
    assert isinstance(results[7], RequestValidationError)
    for number, result in enumerate(results):
        if number != 7:
            assert isinstance(result, InferenceResponse)
            assert result.text == text_after(f"{number}", 4)


@both
async def test_reports_tell_of_the_engine(kind: str, tmp_path: Path) -> None:
    """config, status, metrics and health are the engine's own."""
    async with opened(kind, tmp_path, config={"scheduler": {"max_running_requests": 3}}) as engine:
        await engine.infer("x", max_tokens=3)
        status = await engine.status()
        assert (status.state, status.requests.finished) == (EngineState.READY, 1)
        assert status.model is not None
        assert (status.model.id, status.pages.active) == ("fake", 0)
        assert (await engine.health_check()).healthy
        await until(lambda: engine.metrics().scheduler.generated_tokens == 3)
        assert engine.config.scheduler.max_running_requests == 3


@both
async def test_a_session_is_forked_and_ended(kind: str, tmp_path: Path) -> None:
    """Both sessions have what the first had; one that has ended is not there any more."""
    chat, other = SessionId("chat"), SessionId("other")
    async with opened(kind, tmp_path, config={"kv_cache": {"prefix_caching": False}}) as engine:
        first = await engine.infer("hello", session_id=chat, max_tokens=9)
        await engine.fork_session(chat, other)
        prompt = "hello" + first.text
        for name in (chat, other):
            again = await engine.infer(f"{prompt}!", session_id=name, max_tokens=5)
            assert (again.text, again.usage.cached_tokens) == (text_after(f"{prompt}!", 5), len(prompt) - 1)
        assert await engine.end_session(chat) is True
        assert await engine.end_session(chat) is False
        with pytest.raises(NotFound, match="'chat'"):
            await engine.fork_session(chat, SessionId("third"))
        with pytest.raises(RequestValidationError, match="new_session_id"):
            await engine.fork_session(other, other)


@both
async def test_a_session_is_its_clients(kind: str, tmp_path: Path) -> None:
    """It is forked and ended under the client_id that its requests have, and no other."""
    chat, ada, bob = SessionId("chat"), ClientId("ada"), ClientId("bob")
    async with opened(kind, tmp_path) as engine:
        await engine.infer("hello", session_id=chat, client_id=ada, max_tokens=3)
        assert not await engine.end_session(chat)
        assert not await engine.end_session(chat, client_id=bob)
        with pytest.raises(NotFound):
            await engine.fork_session(chat, SessionId("other"), client_id=bob)
        await engine.fork_session(chat, SessionId("other"), client_id=ada)
        assert await engine.end_session(chat, ada)
        assert await engine.end_session(SessionId("other"), ada)


@both
async def test_no_session_has_a_name_that_no_request_can_have(kind: str, tmp_path: Path) -> None:
    """Such a name is a RequestValidationError that says which it is, and the engine goes on."""
    good, long = SessionId("s"), SessionId("s" * 257)
    async with opened(kind, tmp_path) as engine:
        for wrong in (long, SessionId("a\n"), SessionId(""), 7):
            with pytest.raises(RequestValidationError, match=r"^session_id"):
                await engine.end_session(wrong)  # type: ignore[arg-type]
            with pytest.raises(RequestValidationError, match=r"^new_session_id"):
                await engine.fork_session(good, wrong)  # type: ignore[arg-type]
            with pytest.raises(RequestValidationError, match=r"^client_id"):
                await engine.end_session(good, wrong)  # type: ignore[arg-type]
        assert not await engine.end_session(good)


async def test_a_callers_functions_do_not_travel(tmp_path: Path) -> None:
    """A logits processor is refused by the client, before anything is sent."""

    class Processor:
        def apply(self, token_ids: list[int], logits: Any) -> Any:
            return logits

    async with opened("client", tmp_path) as engine:
        with pytest.raises(Unsupported, match="logits_processors"):
            await engine.infer("x", logits_processors=[Processor()])
        assert (await engine.infer("y", max_tokens=3)).text == text_after("y", 3)


async def test_no_daemon_is_not_found(tmp_path: Path) -> None:
    """Where nobody listens the error says so, and how to start one."""
    with pytest.raises(NotFound, match="ferrum-rt serve"):
        async with connect(tmp_path / "nobody"):
            pass


async def test_a_daemon_that_ends_tells_every_waiter(tmp_path: Path) -> None:
    """Calls under way end with a typed error at once, and so does every later call."""
    failed: list[BaseException] = []
    stop = anyio.Event()

    async def run(*, task_status: anyio.abc.TaskStatus[tuple[Runtime, Path]]) -> None:
        async with daemon(tmp_path, step_s=0.001) as opened:
            task_status.started(opened)
            await stop.wait()

    async def wait(engine: InferenceEngine, prompt: str) -> None:
        try:
            await engine.infer(prompt, max_tokens=900)
        except (Cancelled, ConnectionLost) as error:
            failed.append(error)

    async with anyio.create_task_group() as tasks:
        runtime, path = await tasks.start(run)
        async with connect(path) as client:
            async with anyio.create_task_group() as waiters:
                for number in range(3):
                    waiters.start_soon(wait, client, f"{number}")
                await until(lambda: runtime.status_now().requests.running == 3)
                stop.set()
            assert len(failed) == 3
            with pytest.raises((Cancelled, ConnectionLost)):
                await client.infer("x")
            with pytest.raises((Cancelled, ConnectionLost)):
                await client.status()


async def test_a_daemon_that_dies_gives_every_waiter_connection_lost(tmp_path: Path) -> None:
    """Whoever waits for anything hears of it at once, and the client does not connect again by itself."""
    lost: list[str] = []
    async with forked_daemon(tmp_path / "s.sock", step_s=0.001) as process, connect(tmp_path / "s.sock") as client:

        async def wait(prompt: str) -> None:
            with pytest.raises(ConnectionLost):
                await client.infer(prompt, max_tokens=900)
            lost.append(prompt)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as waiters:
                for number in range(3):
                    waiters.start_soon(wait, f"{number}")
                await settled(client, lambda status: status.requests.running == 3)
                process.send(signal.SIGKILL)
            assert len(lost) == 3
            end = partial(client.end_session, SessionId("s"))
            for call in (client.status, client.health_check, end, lambda: client.infer("x")):
                with pytest.raises(ConnectionLost):
                    await call()
    with pytest.raises(NotFound):
        async with connect(tmp_path / "s.sock"):
            pass


def test_a_client_runs_on_trio(tmp_path: Path) -> None:
    """The client needs no asyncio: on trio it streams, is cancelled, and hears of errors as elsewhere."""

    async def talk() -> None:
        async with forked_daemon(tmp_path / "s.sock", step_s=0.001), connect(tmp_path / "s.sock") as client:
            async with client.infer_stream("trio", max_tokens=3 * CREDIT) as chunks:
                text = "".join([chunk.text async for chunk in chunks])
            assert text == text_after("trio", 3 * CREDIT)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(client.infer, "x", max_tokens=900))
                await settled(client, lambda status: status.requests.running == 1)
                tasks.cancel_scope.cancel()
            assert (await settled(client, lambda status: status.requests.cancelled == 1)).pages.active == 0
            with pytest.raises(RequestValidationError):
                await client.infer("x" * 2000)

    anyio.run(talk, backend="trio")


async def test_closing_a_client_ends_its_requests_alone(tmp_path: Path) -> None:
    """A client that is closed under way cancels its own; the daemon and other clients go on."""
    received: list[StreamChunk] = []
    async with daemon(tmp_path, step_s=0.001) as (runtime, path), connect(path) as other:
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                async with other.infer_stream("other", max_tokens=100) as chunks:
                    received.extend([chunk async for chunk in chunks])

            tasks.start_soon(read)
            async with connect(path) as client:
                async with client.infer_stream("x", max_tokens=900) as chunks:
                    await anext(chunks)
                    await client.shutdown()
                    with pytest.raises(Cancelled):
                        async for _ in chunks:
                            pass
            await until(lambda: runtime.status_now().requests.cancelled == 1)
    assert "".join(chunk.text for chunk in received) == text_after("other", 100)


async def test_the_hosts_loop_hears_of_nothing(tmp_path: Path) -> None:
    """Clients that are closed while chunks are on their way leave no error with the event loop."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with daemon(tmp_path) as (runtime, path):
        for number in range(30):
            async with connect(path) as client:
                async with client.infer_stream(f"{number}", max_tokens=900) as chunks:
                    for _ in range(number % 5):
                        await anext(chunks)
        await until(lambda: runtime.status_now().pages.active == 0)
        assert runtime.status_now().requests.cancelled >= 20  # some were left before they were sent
    assert reported == []
