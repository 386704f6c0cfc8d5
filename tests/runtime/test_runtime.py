"""The runtime's promises to its callers, over the fake executor."""

import threading
from concurrent.futures import Future

import anyio
import pytest

from ferrum_rt import (
    BackendError,
    ChatMessage,
    DeadlineExceeded,
    EngineConfig,
    EngineFailed,
    FinishReason,
    InferenceRequest,
    InferenceResponse,
    RequestId,
    RequestValidationError,
    ResourceExhausted,
    SamplingParams,
    StreamChunk,
    TokenizerError,
)
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.simulation.digests import expected_tokens
from ferrum_rt.runtime.threads.worker import finished
from tests.fakes.executor import EOS, FakeExecutor, fake_model
from tests.runtime.engines import fake_engine, text_after, until


class Gate:
    """Holds the executor's thread at a step until it is opened."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, number: int, step: StepInput) -> None:
        if number == self.at_step:
            self.reached.set()
            assert self.opened.wait(10)


# -- what comes out ---------------------------------------------------------------------------------------------------


async def test_infer_returns_the_whole_text_with_usage_and_metrics() -> None:
    """A response has the text, its tokens, why it ended, what it used and how long each phase took."""
    async with fake_engine() as (engine, _):
        response = await engine.infer("hello", max_tokens=12)
        assert response.text == text_after("hello", 12)
        assert response.token_ids == expected_tokens(b"hello", 12)
        assert response.finish_reason is FinishReason.LENGTH
        assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (5, 12)
        assert response.metrics is not None
        assert 0 <= response.metrics.queue_s <= response.metrics.ttft_s <= response.metrics.total_s


async def test_infer_stream_ends_with_exactly_one_terminal_chunk() -> None:
    """The chunks add up to the response, and only the last has a reason and the usage."""
    async with fake_engine() as (engine, _):
        chunks: list[StreamChunk] = []
        async with engine.infer_stream("hello", max_tokens=12) as stream:
            chunks.extend([chunk async for chunk in stream])
        assert "".join(chunk.text for chunk in chunks) == text_after("hello", 12)
        assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + [FinishReason.LENGTH]
        assert [chunk.usage is not None for chunk in chunks] == [False] * 11 + [True]


async def test_every_kind_of_prompt() -> None:
    """Text, token ids, chat messages and a whole request are the same thing said in four ways."""
    async with fake_engine() as (engine, _):
        text = await engine.infer("user: hi\nassistant: ", max_tokens=4)
        ids = await engine.infer(list(b"user: hi\nassistant: "), max_tokens=4)
        request = InferenceRequest(prompt="user: hi\nassistant: ", sampling_params=SamplingParams(max_tokens=4))
        whole = await engine.infer(request)
        chat = await engine.infer([ChatMessage(role="user", content="hi")], max_tokens=4)
        assert text.text == ids.text == whole.text == chat.text


async def test_infer_batch_answers_each_in_its_place() -> None:
    """A bad prompt among many is an error in its own place; more prompts than fit at once are fed in as there is room."""
    config = {"scheduler": {"max_running_requests": 4, "max_waiting_requests": 8}}
    async with fake_engine(config) as (engine, _):
        prompts: list[str | list[int]] = [f"prompt {index}" for index in range(50)]
        prompts[20] = [1, 999]
        results = await engine.infer_batch(prompts, max_tokens=5)
        for index, result in enumerate(results):
            if index == 20:
                assert isinstance(result, RequestValidationError)
                assert "999" in str(result)
            else:
                assert isinstance(result, InferenceResponse)
                assert result.text == text_after(f"prompt {index}", 5)


async def test_eos_ends_a_text_unless_ignored() -> None:
    """The model's end token ends the output and is not part of the text; ``ignore_eos`` goes on to max_tokens."""
    async with fake_engine(answer=lambda digest: EOS) as (engine, _):
        response = await engine.infer("x", max_tokens=5)
        assert (response.text, response.finish_reason) == ("", FinishReason.EOS)
        response = await engine.infer("x", max_tokens=5, ignore_eos=True)
        assert (len(response.token_ids), response.finish_reason) == (5, FinishReason.LENGTH)


async def test_stop_token_ids_end_a_text() -> None:
    """The stop token ends the output and is not part of the text."""
    expected = expected_tokens(b"x", 20)
    stop = expected[6]
    async with fake_engine() as (engine, _):
        response = await engine.infer("x", max_tokens=20, stop_token_ids=[stop])
        end = expected.index(stop)
        assert response.finish_reason is FinishReason.STOP
        assert response.text == bytes(expected[:end]).decode()


@pytest.mark.parametrize("include", [False, True])
async def test_stop_strings_across_chunks(include: bool) -> None:
    """A stop string that comes in several tokens ends the text before it, or after it with include_stop, and its pages are
    freed at once."""
    text = text_after("x", 40)
    stop = text[7:11]
    async with fake_engine() as (engine, _):
        response = await engine.infer("x", max_tokens=40, stop=["never", stop], include_stop=include)
        assert response.text == text[: text.index(stop) + (len(stop) if include else 0)]
        assert response.finish_reason is FinishReason.STOP
        await until(lambda: engine.metrics().scheduler.pages.active == 0)


async def test_half_a_stop_string_at_the_end_is_given_out() -> None:
    """What was held back as the possible start of a stop string comes out when the text ends without it."""
    text = text_after("x", 10)
    async with fake_engine() as (engine, _):
        response = await engine.infer("x", max_tokens=10, stop=[text[-3:] + "…"])
        assert response.text == text


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_a_full_engine_says_so_at_once() -> None:
    """Past the bound a request is refused with ResourceExhausted and a time to come back; those inside are served."""
    gate = Gate(1)
    config = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with fake_engine(config, on_step=gate) as (engine, _), anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(lambda: engine.infer("x", max_tokens=2))
        await until(gate.reached.is_set)
        with pytest.raises(ResourceExhausted) as caught:
            await engine.infer("x", max_tokens=2)
        assert caught.value.retry_after > 0
        gate.opened.set()
    status = await engine.status()
    assert (status.requests.finished, status.requests.rejected) == (2, 1)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({"max_model_len": 64}, ["5", "100", "105", "64"]),
        ({"kv_cache": {"num_pages": 4}}, ["5", "100", "105", "64"]),
    ],
)
async def test_what_can_never_fit_is_refused_with_the_numbers(config: dict[str, object], numbers: list[str]) -> None:
    """A request longer than the engine can ever hold fails by itself, saying what it needs and what there is."""
    async with fake_engine(config) as (engine, _):
        with pytest.raises(RequestValidationError) as caught:
            await engine.infer("hello", max_tokens=100)
        assert all(number in str(caught.value) for number in numbers)
        assert (await engine.infer("hello", max_tokens=10)).finish_reason is FinishReason.LENGTH


async def test_the_default_length_stays_within_the_model() -> None:
    """Without max_tokens a request gets the engine's default, or what is left of the context."""
    async with fake_engine({"max_model_len": 64, "sampling": {"max_tokens": 50}}) as (engine, _):
        assert len((await engine.infer("hello")).token_ids) == 50
        assert len((await engine.infer("h" * 60)).token_ids) == 4


async def test_two_requests_with_one_id() -> None:
    """An id that is under way is refused; afterwards it can be used again."""
    async with fake_engine() as (engine, _):
        async with engine.infer_stream("x", id=RequestId("mine"), max_tokens=3) as stream:
            with pytest.raises(RequestValidationError, match="mine"):
                await engine.infer("x", id=RequestId("mine"))
            _ = [chunk async for chunk in stream]
        await engine.infer("x", id=RequestId("mine"), max_tokens=1)


# -- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_deadline_ends_a_text_with_what_there_is() -> None:
    """A deadline that passes after the first token ends the output with that reason."""
    async with fake_engine(step_s=0.01) as (engine, _):
        response = await engine.infer("x", max_tokens=1000, deadline_s=0.1)
        assert response.finish_reason is FinishReason.DEADLINE
        assert 0 < len(response.token_ids) < 1000


async def test_a_deadline_before_the_first_token_is_an_error() -> None:
    """A request that never got to run in its time fails with DeadlineExceeded; the one that ran goes on."""
    config = {"scheduler": {"max_running_requests": 1}}
    async with fake_engine(config, step_s=0.01) as (engine, _):
        async with engine.infer_stream("x", max_tokens=20) as stream:
            first = await anext(aiter(stream))  # else y, which has a deadline, would be the one to run
            with pytest.raises(DeadlineExceeded):
                await engine.infer("y", deadline_s=0.05)
            assert first.text + "".join([chunk.text async for chunk in stream]) == text_after("x", 20)


async def test_a_deadline_wakes_an_idle_engine() -> None:
    """A parked request's deadline ends it although there is no step to run."""
    async with fake_engine({"batching": {"stream_capacity": 2}}) as (engine, _):
        async with engine.infer_stream("x", max_tokens=100, deadline_s=0.1) as stream:
            await until(lambda: engine.metrics().scheduler.parked == 1)
            await until(lambda: engine.metrics().scheduler.pages.active == 0)
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].finish_reason is FinishReason.DEADLINE


# -- cancellation -----------------------------------------------------------------------------------------------------


async def test_cancelling_the_task_frees_the_pages_at_once() -> None:
    """When the cancelled call returns, its pages are free, even while the step that writes to them still runs."""
    gate = Gate(3)
    async with fake_engine(on_step=gate) as (engine, _):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: engine.infer("x", max_tokens=100))
            await until(gate.reached.is_set)
            assert engine.metrics().scheduler.pages.active > 0
            tasks.cancel_scope.cancel()
        assert engine.metrics().scheduler.pages.active == 0
        gate.opened.set()
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)
        assert (await engine.status()).requests.cancelled == 1


async def test_leaving_a_stream_early_cancels_it() -> None:
    """Breaking out of the block frees the request; the engine goes on."""
    async with fake_engine() as (engine, _):
        async with engine.infer_stream("x", max_tokens=1000) as stream:
            async for _ in stream:
                break
        assert engine.metrics().scheduler.pages.active == 0
        status = await engine.status()
        assert (status.requests.cancelled, status.requests.running) == (1, 0)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13, 21])
async def test_cancelling_at_any_moment_leaves_nothing(steps: int) -> None:
    """However far a request had come when its task was cancelled: one terminal event, no page."""
    async with fake_engine({"batching": {"max_batched_tokens": 64}}) as (engine, _):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                for index in range(6):
                    tasks.start_soon(lambda text: engine.infer(text, max_tokens=10), f"{index}" * 70)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
        assert engine.metrics().scheduler.pages.active == 0
        requests = (await engine.status()).requests
        assert requests.cancelled + requests.finished <= 6
        assert (requests.running, requests.waiting, requests.parked) == (0, 0, 0)
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)


# -- slow readers -----------------------------------------------------------------------------------------------------


async def test_a_slow_reader_parks_its_own_sequence_and_nothing_else() -> None:
    """A stream that nobody reads stops at its bound while another finishes; read at last, it is complete."""
    config = {"batching": {"stream_capacity": 4}}
    async with fake_engine(config) as (engine, _):
        async with engine.infer_stream("slow", max_tokens=200) as slow:
            await until(lambda: engine.metrics().scheduler.parked == 1)
            assert (await engine.infer("quick", max_tokens=100)).text == text_after("quick", 100)
            assert engine.metrics().scheduler.generated_tokens < 100 + 20
            assert "".join([chunk.text async for chunk in slow]) == text_after("slow", 200)


async def test_parked_sequences_make_room_for_those_who_wait() -> None:
    """With every slot held by slow readers a new request runs all the same, and the slow ones lose nothing."""
    config = {"batching": {"stream_capacity": 2}, "scheduler": {"max_running_requests": 2}}
    async with fake_engine(config) as (engine, _):
        async with (
            engine.infer_stream("one", max_tokens=50) as one,
            engine.infer_stream("two", max_tokens=50) as two,
        ):
            await until(lambda: engine.metrics().scheduler.parked == 2)
            assert (await engine.infer("three", max_tokens=20)).text == text_after("three", 20)
            assert "".join([chunk.text async for chunk in one]) == text_after("one", 50)
            assert "".join([chunk.text async for chunk in two]) == text_after("two", 50)


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_nan_logits_fail_one_request() -> None:
    """The row whose logits are NaN fails alone; its neighbours in the batch are as they would have been."""
    async with fake_engine(nan_requests={RequestId("bad")}) as (engine, _):
        results = await engine.infer_batch(
            [InferenceRequest(prompt=name, id=RequestId(name)) for name in ("one", "bad", "two")], max_tokens=8
        )
        assert isinstance(results[1], BackendError)
        for index, name in ((0, "one"), (2, "two")):
            result = results[index]
            assert isinstance(result, InferenceResponse)
            assert result.text == text_after(name, 8)


async def test_a_step_that_raises_fails_its_requests_and_not_the_engine() -> None:
    """The requests of the step end with BackendError that says why; the next one is served."""
    async with fake_engine(fail_at={4}) as (engine, _):
        with pytest.raises(BackendError, match="told to fail"):
            await engine.infer("x", max_tokens=50)
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)
        assert (await engine.health_check()).healthy
        assert (await engine.status()).requests.failed == 1


async def test_text_that_cannot_be_tokenized_fails_one_request() -> None:
    """A lone surrogate is a TokenizerError for its own request."""
    async with fake_engine() as (engine, _):
        with pytest.raises(TokenizerError):
            await engine.infer("\ud800")
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)


class ForgetfulExecutor(FakeExecutor):
    """Loses the outputs of its third step."""

    def execute(self, step: StepInput) -> Future[StepOutput]:
        output = super().execute(step)
        return finished(StepOutput([], [])) if self.num_steps == 3 else output


async def test_a_fault_of_ours_fails_the_engine_and_not_the_host() -> None:
    """An internal fault ends every request with EngineFailed, says so in health, and the host's block goes on."""
    async with Runtime(EngineConfig(), lambda config: fake_model(config, ForgetfulExecutor(config))) as engine:
        results = await engine.infer_batch(["x", "y"], max_tokens=50)
        assert [type(result) for result in results] == [EngineFailed, EngineFailed]
        assert not (await engine.health_check()).healthy
        with pytest.raises(EngineFailed, match="internal fault"):
            await engine.infer("z")


async def test_a_ledger_that_does_not_add_up_fails_the_engine() -> None:
    """The page ledger is checked when a request ends, in production too."""
    async with fake_engine(step_s=0.001) as (engine, _):
        async with engine.infer_stream("x", max_tokens=1000) as stream:
            await anext(aiter(stream))
            engine._cache._free.append(0)  # what only a bug could do
        with pytest.raises(EngineFailed, match="page ledger"):
            await engine.infer("z")
