"""The demo model's tokenizer, grammars for it, and what their matchers allow."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

import ferrum_rt
from ferrum_rt.interfaces.grammar import Grammar, GrammarMatcher
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from ferrum_rt.runtime.text.grammar import LlGrammarCompiler

Kind = Literal["text", "json_object", "json_schema", "regex", "grammar"]

TOKENIZER = Path(ferrum_rt.__file__).parent / "demo_model" / "tokenizer.json"
NUM_TOKENS = 4096
ENDS = frozenset({TokenId(1), TokenId(3)})
# Neither a multiple of 32, nor of 8: models pad their logits to all kinds of lengths.
NUM_LOGITS = NUM_TOKENS + 13


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@cache
def compiler() -> LlGrammarCompiler:
    return LlGrammarCompiler(TOKENIZER, NUM_LOGITS, sorted(ENDS))


def compile_format(kind: Kind, definition: str | dict[str, Any] | None = None) -> Grammar:
    return compiler().compile(ResponseFormat(type=kind, definition=definition))


def encode(text: str) -> list[TokenId]:
    return [TokenId(token_id) for token_id in tokenizer().encode(text, add_special_tokens=False).ids]


def allowed(matcher: GrammarMatcher, num_logits: int = NUM_LOGITS) -> set[int]:
    """The token ids whose bits are set; nothing but 0 may follow the vocabulary."""
    mask = bytearray(b"\xff" * (-(-num_logits // 32) * 4))
    matcher.write_mask(memoryview(mask))
    bits = int.from_bytes(mask, "little")
    assert bits >> num_logits == 0
    return {index for index, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"}


def after(grammar: Grammar, tokens: list[TokenId]) -> GrammarMatcher:
    matcher = grammar.start()
    for token_id in tokens:
        matcher.advance(token_id)
    return matcher


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether the text is a whole output."""
    matcher = grammar.start()
    for token_id in encode(text):
        if token_id not in allowed(matcher):
            return False
        matcher.advance(token_id)
    return allowed(matcher) >= ENDS
