"""What a tokenizer, a template, a grammar or a detokenizer does to one request is that request's trouble alone."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.interfaces.errors import BackendError, FerrumError, RequestValidationError, TokenizerError
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.executor import ByteDecoder, ByteTokenizer, fake_model
from tests.fakes.grammar import FakeGrammar, FakeGrammarCompiler
from tests.runtime.engines import text_after

CRACK = "crack"


class Panic(BaseException):
    """As Rust code raises it: no Exception."""


class CrackedDecoder(ByteDecoder):
    """Reads the prompt, and no more."""

    def __init__(self, prompt: Sequence[TokenId], skip_special_tokens: bool) -> None:
        self._num_left = len(prompt)
        super().__init__(prompt, skip_special_tokens)

    def push(self, token_id: TokenId) -> str:
        self._num_left -= 1
        if self._num_left < -3:
            raise ZeroDivisionError
        return super().push(token_id)


class BrokenDecoder(ByteDecoder):
    def push(self, token_id: TokenId) -> str:
        raise ZeroDivisionError


class CrackedTokenizer(ByteTokenizer):
    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool, parse_special_tokens: bool = False
    ) -> list[list[TokenId]]:
        if CRACK in texts:
            raise ZeroDivisionError
        return super().encode_batch(texts, add_special_tokens=add_special_tokens, parse_special_tokens=parse_special_tokens)

    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> ByteDecoder:
        cls = {b"cracked": CrackedDecoder, b"broken": BrokenDecoder}.get(bytes(prompt), ByteDecoder)
        return cls(prompt, skip_special_tokens)


class CrackedCompiler(FakeGrammarCompiler):
    def compile(self, response_format: ResponseFormat) -> FakeGrammar:
        if response_format.definition == CRACK:
            raise Panic("index out of bounds")
        return super().compile(response_format)


@asynccontextmanager
async def cracked_engine() -> AsyncIterator[Runtime]:
    def load(config: EngineConfig) -> LoadedModel:
        return msgspec.structs.replace(fake_model(config), tokenizer=CrackedTokenizer(), grammars=CrackedCompiler())

    async with Runtime(build_config(None, None, {}), load) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "fields", "kind"),
    [
        (CRACK, {}, TokenizerError),
        ("cracked", {}, TokenizerError),
        ("broken", {}, TokenizerError),
        ("x", {"response_format": {"type": "regex", "definition": CRACK}}, BackendError),
        ("x", {"response_format": {"type": "json_object"}}, RequestValidationError),
    ],
    ids=["tokenizer", "detokenizer", "detokenizer at its start", "compiler", "compiler that refuses"],
)
async def test_a_fault_in_one_request_is_no_others(prompt: str, fields: Any, kind: type[FerrumError]) -> None:
    """A request that makes a part of the pipeline raise anything at all gets that as a typed error; those beside it and
    after it get their answers, and nothing of it is left."""
    texts: list[str] = []

    async def run(engine: Runtime, number: int) -> None:
        texts.append((await engine.infer(f"prompt {number}", max_tokens=20)).text)

    async with cracked_engine() as engine:
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(run, engine, number)
            with pytest.raises(kind):
                await engine.infer(prompt, max_tokens=20, **fields)
        await run(engine, 4)
        status = await engine.status()
        assert (await engine.health_check()).healthy
    assert sorted(texts) == sorted(text_after(f"prompt {number}", 20) for number in range(5))
    assert (status.requests.failed, status.requests.finished, status.pages.active) == (1, 5, 0)


@pytest.mark.parametrize("fields", [{}, {"bad_words": ["x"]}], ids=["alone", "with bad words"])
async def test_a_token_id_that_the_model_lacks_is_no_others_trouble(fields: Any) -> None:
    """Such an id is refused before it can reach a step, whatever else the request has."""
    async with cracked_engine() as engine:
        with pytest.raises(RequestValidationError, match="vocabulary"):
            await engine.infer([1, 10**6], max_tokens=3, **fields)
        assert engine.metrics().steps == 0
