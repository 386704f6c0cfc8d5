"""Decodes that go several rounds in one step."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from ferrum_rt import FinishReason, InferenceRequest, InferenceResponse, RequestId, SamplingParams, TokenId
from ferrum_rt.interfaces.errors import BackendError
from ferrum_rt.interfaces.model_executor import DecodeOutput, StepOutput
from ferrum_rt.interfaces.sampler import SampledToken, SamplingConfig
from ferrum_rt.interfaces.scheduler import BatchHint, BatchPlan, SequenceRequest, SequenceUpdate
from ferrum_rt.runtime.execution import step_runner
from ferrum_rt.runtime.execution.executor import DecoderExecutor
from ferrum_rt.runtime.execution.step_rows import StepRows
from ferrum_rt.runtime.runtime import open_runtime
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.simulation.digests import DigestMemory, expected_tokens
from ferrum_rt.runtime.text.output_text import OutputText
from tests.fakes.executor import EOS, ByteTokenizer
from tests.runtime.engines import fake_engine

PROMPT = [TokenId(token) for token in b"once upon"]
MANY = BatchHint(now=0.0, max_tokens=64, rounds_s=1.0)
ONE = BatchHint(now=0.0, max_tokens=64)


class Steps:
    """A scheduler that has seen enough steps of a millisecond to know what one takes, and a memory that answers."""

    def __init__(self, num_pages: int = 64) -> None:
        self.cache = PagedKvCache(num_pages, 4)
        self.scheduler = UnifiedScheduler(self.cache, num_slots=2, max_model_len=128, max_rounds=8)
        self.memory = DigestMemory(2, num_pages, 4)

    def submit(self, name: str, max_tokens: int = 40, ends: Sequence[TokenId] = (), **sampling: Any) -> None:
        self.scheduler.submit(
            SequenceRequest(
                request_id=RequestId(name), token_ids=PROMPT, max_tokens=max_tokens, sampling=SamplingConfig(**sampling),
                eos_token_ids=frozenset(ends),
            )
        )  # fmt: skip

    def step(self, hint: BatchHint = MANY) -> tuple[BatchPlan, list[SequenceUpdate]]:
        plan = self.scheduler.plan(hint)
        assert plan is not None
        updates = self.scheduler.commit(plan, self.memory.execute(plan.step), 0.001 * plan.step.batch.num_rounds)
        self.cache.verify()
        return plan, updates

    def learn(self) -> None:
        for name in ("first", "second", "third"):
            self.submit(name, max_tokens=8)
            for _ in range(8):
                self.step(ONE)


def tokens_of(updates: Sequence[SequenceUpdate]) -> list[TokenId]:
    return [token for update in updates for token in update.token_ids]


def test_a_decode_alone_goes_as_many_rounds_as_fit() -> None:
    """Steps of a millisecond go as often as the executor can where there is a second, five times in 5 ms; and no
    further than to the last token that was asked for. The tokens are those of single steps."""
    steps = Steps()
    steps.learn()
    steps.submit("a", max_tokens=18)
    found = tokens_of(steps.step()[1])

    for hint, rounds in ((MANY, 8), (BatchHint(now=0.0, max_tokens=64, rounds_s=0.0055), 5), (ONE, 1), (MANY, 3)):
        plan, updates = steps.step(hint)
        assert plan.step.batch.num_rounds == rounds
        found += tokens_of(updates)

    assert updates[-1].finish_reason is FinishReason.LENGTH
    assert found == expected_tokens(PROMPT, 18)
    assert steps.scheduler.plan(MANY) is None


def test_rounds_are_planned_behind_rounds() -> None:
    """While one step of rounds is in flight the next one begins where it will end."""
    steps = Steps()
    steps.learn()
    steps.submit("a", max_tokens=33)
    found = tokens_of(steps.step()[1])
    in_flight = steps.scheduler.plan(MANY)
    assert in_flight is not None
    output = steps.memory.execute(in_flight.step)

    for _ in range(3):
        behind = steps.scheduler.plan(MANY)
        assert behind is not None
        assert behind.step.batch.num_rounds == 8
        later = steps.memory.execute(behind.step)
        found += tokens_of(steps.scheduler.commit(in_flight, output))
        in_flight, output = behind, later
    found += tokens_of(steps.scheduler.commit(in_flight, output))

    assert found == expected_tokens(PROMPT, 33)


@pytest.mark.parametrize(
    ("sampling", "rounds"),
    [({"temperature": 0.7, "top_p": 0.9}, 8), ({"logprobs": 1}, 1), ({"logit_bias": {5: 1.0}}, 1), ({"min_tokens": 3}, 1)],
    ids=str,
)
def test_rows_that_need_more_than_a_draw_go_one_by_one(sampling: dict[str, Any], rounds: int) -> None:
    """A step with a row of which more is asked than a token drawn from the model's own logits has one round."""
    steps = Steps()
    steps.learn()
    steps.submit("a")
    steps.submit("b", **sampling)
    steps.step()

    assert steps.step()[0].step.batch.num_rounds == rounds


def test_nobody_waits_behind_rounds() -> None:
    """Where a request waits for a slot, or a prompt is computed, a step has one round."""
    steps = Steps()
    steps.learn()
    for name in "ab":
        steps.submit(name)
    plan, _ = steps.step()
    assert plan.step.batch.num_rounds == 1
    assert steps.step()[0].step.batch.num_rounds == 8
    steps.submit("c")

    assert steps.step()[0].step.batch.num_rounds == 1


def test_without_pages_for_all_rounds_there_is_one() -> None:
    """Rounds take no pages that are not free, and preempt nobody."""
    steps = Steps(num_pages=6)
    steps.learn()
    steps.submit("a", max_tokens=14)
    steps.step()

    plan, _ = steps.step()

    assert plan.step.batch.num_rounds == 8
    steps.submit("b", max_tokens=10)
    steps.step()
    assert steps.step()[0].step.batch.num_rounds == 1
    assert steps.scheduler.statistics().preemptions == 0


def test_an_end_among_the_rounds_is_the_end() -> None:
    """What was computed after a sequence's end token is dropped, and its pages are free."""
    steps = Steps()
    steps.learn()
    expected = expected_tokens(PROMPT, 20)
    last = next(index for index in range(3, 8) if expected[index] not in expected[:index])
    steps.submit("a", ends=[expected[last]])
    found = tokens_of(steps.step()[1])

    plan, (update,) = steps.step()

    assert plan.step.batch.num_rounds == 8
    assert found + update.token_ids == expected[: last + 1]
    assert update.finish_reason is FinishReason.EOS
    assert steps.cache.statistics().pages.active == 0


def test_an_error_among_the_rounds_comes_after_their_tokens() -> None:
    """A request whose logits are not numbers in the third round has the tokens of two, then its error."""
    steps = Steps()
    steps.learn()
    steps.submit("a")
    steps.step()
    plan = steps.scheduler.plan(MANY)
    assert plan is not None
    output = steps.memory.execute(plan.step)
    first, *later = (output.decodes[0].sampled, *output.decodes[0].later)
    later[1] = SampledToken(None, error=BackendError("not numbers"))

    tokens, error = steps.scheduler.commit(plan, StepOutput([DecodeOutput(first, later)], []))

    assert len(tokens.token_ids) == 2
    assert tokens.finish_reason is None
    assert isinstance(error.error, BackendError)
    assert steps.cache.statistics().pages.active == 0


@pytest.mark.parametrize(
    ("text", "ends", "expected"),
    [
        ("one STOP two", {}, ("one ", "one STOP", FinishReason.STOP)),
        ("one STOP two", {"include_stop": True}, ("one STOP", "one STOP", FinishReason.STOP)),
        ("all of it", {"finish_reason": FinishReason.EOS}, ("all of it", "all of it<eos>", FinishReason.EOS)),
    ],
)
def test_tokens_of_one_update_end_where_the_text_does(text: str, ends: dict[str, Any], expected: tuple[str, ...]) -> None:
    """In a chunk of many tokens a stop string takes along what stands behind it; an end token is silent, and no other."""
    reason = ends.pop("finish_reason", None)
    request = InferenceRequest(prompt="", sampling_params=SamplingParams(stop=["STOP"], **ends))
    output = OutputText(request, 0, PROMPT, ByteTokenizer(), None)
    token_ids = [TokenId(token) for token in text.encode()] + ([EOS] if reason else [])

    chunk = output.advance(SequenceUpdate(request_id=request.id, token_ids=token_ids, finish_reason=reason))

    kept = ByteTokenizer().decode(chunk.token_ids, skip_special_tokens=False)
    assert (chunk.text, kept, chunk.finish_reason) == expected
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == len(chunk.token_ids)


async def test_streams_have_the_same_text_in_rounds() -> None:
    """Readers of an engine that goes in rounds get what they would get token by token; in fewer chunks."""
    async with fake_engine({"scheduler": {"max_running_requests": 4}}, max_rounds=8, step_s=0.0005) as (engine, executor):
        responses = await engine.infer_batch(["one", "two", "three"], max_tokens=300, temperature=0.0)
    assert executor.num_steps < 500
    for prompt, response in zip(("one", "two", "three"), responses, strict=True):
        assert isinstance(response, InferenceResponse)
        assert list(response.token_ids) == expected_tokens(prompt.encode(), 300)


@pytest.mark.slow
@pytest.mark.parametrize("temperatures", [(0.0, 0.0, 0.0), (0.8, 0.8, 0.8), (0.0, 1.2, 0.7)], ids=str)
async def test_the_demo_model_says_the_same_in_rounds(
    temperatures: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model's tokens, greedy and drawn, are those of single steps, whatever ends among the rounds."""
    await compare_with_single_steps(temperatures, monkeypatch)


@pytest.mark.slow
async def test_without_kernels_the_sampler_draws_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no compiler is, the sampler draws after each round, and what it draws in single steps."""
    monkeypatch.setattr("ferrum_rt.kernels.cpu.load_kernels", lambda: None)
    for name in ("_LEAST_ROUNDS_S", "_MOST_ROUNDS_S"):  # for a step takes longer
        monkeypatch.setattr(f"ferrum_rt.runtime.engine.{name}", 0.2)
    await compare_with_single_steps((0.8,), monkeypatch)


async def compare_with_single_steps(temperatures: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        InferenceRequest(
            prompt=prompt, sampling_params=SamplingParams(temperature=temperature, top_p=0.9, seed=5, max_tokens=150)
        )
        for prompt, temperature in zip(("def ", "import ", "class "), temperatures, strict=False)
    ]

    async def ask() -> list[list[TokenId]]:
        async with open_runtime(scheduler={"max_running_requests": 4}) as engine:
            results = await engine.infer_batch(requests)
            return [list(result.token_ids) for result in results if isinstance(result, InferenceResponse)]

    rounds: list[int] = []
    run = DecoderExecutor._run_rounds

    def counted(executor: DecoderExecutor, rows: StepRows, num_rounds: int) -> StepOutput:
        rounds.append(num_rounds)
        return run(executor, rows, num_rounds)

    monkeypatch.setattr(DecoderExecutor, "_run_rounds", counted)
    together = await ask()
    assert rounds
    monkeypatch.setattr(step_runner, "MAX_ROUNDS", 1)
    monkeypatch.setattr("ferrum_rt.runtime.execution.executor.MAX_ROUNDS", 1)
    rounds.clear()
    assert await ask() == together
    assert not rounds


async def test_rounds_are_as_long_as_the_loop_is_late() -> None:
    """Where the host's loop comes back late, a step's rounds may take eight times as long, up to 20 ms; else 4 ms."""
    hints: list[float] = []
    async with fake_engine(step_s=0.0002) as (engine, _):
        plan = engine._scheduler.plan

        def noted(hint: BatchHint) -> BatchPlan | None:
            hints.append(hint.rounds_s)
            return plan(hint)

        engine._scheduler.plan = noted  # type: ignore[method-assign]
        async with engine.infer_stream("abc", max_tokens=400, temperature=0.0) as chunks:
            for _ in range(10):  # each time a step is in flight, though on a busy machine it may not have begun
                await anext(chunks)
                busy_until = time.perf_counter() + 0.01
                while time.perf_counter() < busy_until:
                    pass
            async for _ in chunks:
                pass
    assert min(hints) == 0.004
    assert max(hints) == 0.02
