"""Outputs that must have a form, on the demo model: random schemas in one batch with free text, and hostile definitions."""

import json
import time
from functools import partial

import anyio
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import ferrum_rt
from ferrum_rt import InferenceResponse
from ferrum_rt.interfaces.errors import FerrumError, RequestValidationError
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.runtime.runtime import Runtime
from tests.hostile_grammars import HOSTILE, REFUSED
from tests.json_schemas import Schema, json_schemas

pytestmark = pytest.mark.slow

NUM_SCHEMAS = 500
PROMPT = "config = "


def random_schemas(count: int) -> list[Schema]:
    """The same at each run."""
    found: list[Schema] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(json_schemas())
    def draw(schema: Schema) -> None:
        found.append(schema)

    draw()
    return found


async def free_text(engine: Runtime, seed: int) -> list[TokenId]:
    return (await engine.infer("import ", seed=seed, temperature=1.0, max_tokens=40, ignore_eos=True)).token_ids


@pytest.mark.proof
async def test_500_random_schemas_beside_free_text() -> None:
    """At temperature 1 each output that ends validates against its own schema, and every free text in the same batch is what
    it is alone."""
    schemas = random_schemas(NUM_SCHEMAS)
    assert len(schemas) >= NUM_SCHEMAS
    results: dict[int, InferenceResponse | FerrumError] = {}
    texts: dict[int, list[TokenId]] = {}
    async with ferrum_rt.open_runtime(dtype="float32", scheduler={"max_running_requests": 64}, max_model_len=512) as engine:
        alone = [await free_text(engine, seed) for seed in range(4)]

        async def constrained(index: int) -> None:
            form = {"type": "json_schema", "definition": schemas[index]}
            results[index] = await engine.infer(PROMPT, seed=index, temperature=1.0, max_tokens=80, response_format=form)

        async def free(index: int) -> None:
            texts[index] = await free_text(engine, index % 4)

        async with anyio.create_task_group() as tasks:
            for index in range(len(schemas)):
                tasks.start_soon(constrained, index)
                if index % 15 == 0:
                    tasks.start_soon(free, index)
    assert all(tokens == alone[index % 4] for index, tokens in texts.items())
    finished = 0
    for index, response in results.items():
        assert isinstance(response, InferenceResponse)
        if response.finish_reason.value == "eos":
            finished += 1
            validator = jsonschema.Draft202012Validator(schemas[index], format_checker=jsonschema.FormatChecker())
            validator.validate(json.loads(response.text))
    assert finished > 0.5 * len(schemas)  # a string without maxLength can go on for long


# Those that take a compiler longest before it gives up, beside those that it never sees.
SLOWLY_REFUSED = ("grammar: many schemas", "schema: many other names", "regex: optional letters", "schema: 1,000 properties")


async def test_hostile_definitions_fail_alone_and_at_once() -> None:
    """Each hostile definition is its request's RequestValidationError within a second, while sixteen streams go on and get
    what they get anyway."""
    taken: dict[str, float] = {}
    async with ferrum_rt.open_runtime(dtype="float32") as engine:
        alone = [await free_text(engine, seed) for seed in range(4)]
        texts: dict[int, list[TokenId]] = {}

        async def stream(index: int) -> None:
            texts[index] = await free_text(engine, index % 4)

        async def attack() -> None:
            for name in (*SLOWLY_REFUSED, *sorted(REFUSED)):
                kind, definition = HOSTILE[name]
                form = {"type": kind, "definition": definition}
                began = time.perf_counter()
                with pytest.raises(RequestValidationError, match="response_format"):
                    await engine.infer(PROMPT, max_tokens=30, response_format=form)
                taken[name] = time.perf_counter() - began

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attack)
            for index in range(16):
                tasks.start_soon(stream, index)
        assert all(tokens == alone[index % 4] for index, tokens in texts.items())
        assert (await engine.health_check()).healthy
    assert max(taken.values()) < 1.0, taken


async def test_a_grammar_request_can_be_cancelled_at_any_time() -> None:
    """Cancelled while its grammar is compiled, while it waits for that or while it runs, a request leaves nothing behind."""
    form = {"type": "json_schema", "definition": {"type": "object"}}
    async with ferrum_rt.open_runtime() as engine:
        for steps in range(0, 40, 3):
            async with anyio.create_task_group() as tasks:
                for seed in range(3):
                    tasks.start_soon(partial(engine.infer, PROMPT, seed=seed, max_tokens=200, response_format=form))
                for _ in range(steps):
                    await anyio.sleep(0.002)
                tasks.cancel_scope.cancel()
        status = await engine.status()
        assert status.pages.active == 0
        assert status.requests.running == status.requests.waiting == 0
        assert (await engine.infer(PROMPT, max_tokens=2)).token_ids
