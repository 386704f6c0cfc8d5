"""A tokenizer, a detokenizer and a grammar compiler whose errors quote what they were given."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from tests.fakes.executor import ByteDecoder, ByteTokenizer, fake_model
from tests.fakes.grammar import FakeGrammar, FakeGrammarCompiler


class Panic(BaseException):
    """As Rust code raises it."""


class _QuotingDecoder(ByteDecoder):
    """Raises, with the text, at its start or after so many tokens."""

    def __init__(self, prompt: Sequence[TokenId], skip_special_tokens: bool) -> None:
        self._num_left = {b"1": 0, b"2": 8}.get(bytes(prompt[:1]), 10**6)
        self._text = bytes(token for token in prompt if token < 256).decode()
        super().__init__(prompt, skip_special_tokens)

    def push(self, token_id: TokenId) -> str:
        piece = super().push(token_id)
        self._text += piece
        self._num_left -= 1
        if self._num_left < 0:
            raise ValueError(f"cannot go on from {self._text}", self._text)
        return piece


class _QuotingTokenizer(ByteTokenizer):
    def encode_batch(self, texts: Sequence[str], **options: Any) -> list[list[TokenId]]:
        if texts and texts[0].startswith("0"):
            raise ValueError(f"cannot take {texts}")
        if texts and texts[0].startswith("surrogate"):
            texts[0].encode()
        return super().encode_batch(texts, **options)

    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> ByteDecoder:
        return _QuotingDecoder(prompt, skip_special_tokens)


class _QuotingCompiler(FakeGrammarCompiler):
    def compile(self, response_format: ResponseFormat) -> FakeGrammar:
        if response_format.type == "regex":
            raise Panic(response_format.definition)
        raise LookupError(response_format.definition)


@asynccontextmanager
async def quoting_engine() -> AsyncIterator[Runtime]:
    def load(config: EngineConfig) -> LoadedModel:
        return msgspec.structs.replace(fake_model(config), tokenizer=_QuotingTokenizer(), grammars=_QuotingCompiler())

    async with Runtime(build_config(None, None, {}), load) as engine:
        yield engine
