"""Grammars that an output must follow, compiled and matched by llguidance (Earley parser over derivatives of regular
expressions, github.com/guidance-ai/llguidance)."""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from ferrum_rt.interfaces.errors import Unsupported
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from ferrum_rt.runtime.text import grammar_limits
from ferrum_rt.runtime.text.grammar_limits import refuse

MAX_CACHED_GRAMMARS = 32
MAX_CACHED_BYTES = 1024 * 1024

# About 10,000 units of fuel or 200 items take a millisecond. Errors are not verbose: those quote the grammar and the output.
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)

# What stands in llguidance's messages of a definition: regular expressions, and lines with carets below them.
_QUOTATIONS = (
    (re.compile(r'invalid regex ".*" \(in regex\): ', re.DOTALL), "invalid regex: "),
    (re.compile(r"regex parse error:\n.*\nerror: ", re.DOTALL), "regex parse error: "),
    (re.compile(r"^\s*(\d+ \|.*|\^+)$", re.MULTILINE), ""),
)
_LONG_WORD = re.compile(r"\S{11,}")

# Left to itself, llguidance computes all that the grammar forces as soon as it is forced (a{1000000} is a million bytes, out
# of fuel's reach), and of the tokens that the grammar allows there, only one would be in the mask.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


class LlGrammarCompiler:
    """Compiles for one vocabulary. ``tokenizer_json`` is a tokenizer.json, or its path; ``vocab_size`` the length of the
    model's logits. It is read at once, because that takes 20 ms for 4,000 tokens and 0.5 s for 150,000, with the GIL held;
    a tokenizer that llguidance cannot use is Unsupported when something is to be compiled."""

    def __init__(self, tokenizer_json: str | Path, vocab_size: int, end_token_ids: Sequence[TokenId]) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = _read_tokenizer(tokenizer_json, vocab_size, end_token_ids)
        self._cache: OrderedDict[str, LlGrammar] = OrderedDict()

    def compile(self, response_format: ResponseFormat) -> "LlGrammar":
        source = _source(response_format)
        # Outputs share the automaton of their grammar. When it has outgrown its limits, they fail, and it is made anew.
        for exhausted in [source for source, grammar in self._cache.items() if grammar.is_exhausted]:
            del self._cache[exhausted]
        if (cached := self._cache.get(source)) is not None:
            self._cache.move_to_end(source)
            return cached
        if isinstance(self._tokenizer, Unsupported):
            raise self._tokenizer
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        if matcher.is_error():
            refuse(_explain(matcher.get_error()))
        grammar = LlGrammar(matcher, self._vocab_size, frozenset(self._tokenizer.eos_tokens))
        _try_out(grammar, self._vocab_size)
        self._cache[source] = grammar
        while len(self._cache) > MAX_CACHED_GRAMMARS or sum(map(len, self._cache)) > MAX_CACHED_BYTES:
            self._cache.popitem(last=False)
        return grammar


class LlGrammar:
    """A matcher at the start of its text, to be copied."""

    def __init__(self, template: LLMatcher, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self.vocab_size, self.end_token_ids = vocab_size, end_token_ids
        self.is_exhausted = False
        self._template = template

    def start(self) -> "LlGrammarMatcher":
        return LlGrammarMatcher(self._template.deep_copy(), self)


class LlGrammarMatcher:
    """Stays failed, once it has. After the end it takes any token: the engine runs one step ahead."""

    def __init__(self, matcher: LLMatcher, grammar: LlGrammar) -> None:
        self._matcher, self._grammar = matcher, grammar

    def advance(self, token_id: TokenId) -> None:
        self._check()
        if self._matcher.is_stopped():
            return
        if not 0 <= token_id < self._grammar.vocab_size:
            refuse(f"token {token_id} is not in the vocabulary")
        self._matcher.consume_token(token_id)
        self._check()

    def write_mask(self, mask: memoryview) -> None:
        found = self._matcher.compute_bitmask()  # computed without the GIL; once stopped, the end tokens
        self._check()
        num_bytes = -(-self._grammar.vocab_size // 8)
        target = mask.cast("B")
        target[:num_bytes] = found[:num_bytes]
        target[num_bytes:] = bytes(len(target) - num_bytes)
        if spare := -self._grammar.vocab_size % 8:
            target[num_bytes - 1] &= 0xFF >> spare

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        error = self._matcher.get_error()  # not to be shown: it quotes the output
        if "doesn't satisfy the grammar" in error:
            refuse("the grammar does not allow this token here")
        if error.startswith("NoExtension"):
            refuse("no token can follow: the definition cannot be met")
        self._grammar.is_exhausted = True
        refuse("the definition is too complex")


def _source(response_format: ResponseFormat) -> str:
    """What llguidance calls a list of grammars, as JSON: exactly the same for what is the same."""
    kind, definition = response_format.type, response_format.definition
    if kind == "text":
        refuse("text needs no grammar")
    if kind == "json_object":
        if definition is not None:
            refuse("json_object has no definition; use json_schema")
        return _schema_source({"type": "object"})
    if definition is None:
        refuse(f"{kind} needs a definition")
    if kind == "json_schema":
        if not isinstance(definition, str | dict):
            refuse("the definition of json_schema must be a JSON object, or its text")
        return _schema_source(grammar_limits.read_schema(definition))
    if not isinstance(definition, str):
        refuse(f"the definition of {kind} must be a string")
    if kind == "regex":
        grammar_limits.check_regex(definition)
        return _lark_source(f"start: /{regex_to_lark(definition, use_ascii='')}/")
    return _lark_source(grammar_limits.read_lark(definition))


def _schema_source(schema: dict[str, Any]) -> str:
    named = {"name": "schema", "json_schema": {**schema, "x-guidance": grammar_limits.JSON_OPTIONS}}
    return json.dumps({"grammars": [{"lark_grammar": "start: @schema" + _OPTIONS}, named]})


def _lark_source(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text + _OPTIONS}]})


def _try_out(grammar: LlGrammar, vocab_size: int) -> None:
    """Most definitions that are too complex, or cannot be met, show it in the first or the second mask."""
    mask = bytearray(-(-vocab_size // 8))
    matcher = grammar.start()
    ends = sum(1 << token_id for token_id in grammar.end_token_ids)
    for _ in range(2):
        matcher.write_mask(memoryview(mask))
        allowed = int.from_bytes(mask, "little") & ~ends
        if not allowed:
            return
        matcher.advance(TokenId((allowed & -allowed).bit_length() - 1))


def _explain(error: str) -> str:
    """llguidance's message, without backtraces and without quoting more of the definition than a few words of it."""
    if error.startswith("panic") or not error.strip():
        return "the definition is too complex"
    if error.startswith("oneOf"):
        return "oneOf is supported only where its options plainly exclude one another; anyOf may serve"
    if error.startswith("Unsatisfiable schema"):  # and then its values
        return "unsatisfiable schema: its constraints contradict one another"
    for quoted, instead in _QUOTATIONS:
        error = quoted.sub(instead, error)
    text = error.replace("<non-verbose/>", "").replace("Unimplemented keys", "unsupported keywords")
    text = _LONG_WORD.sub(_without_data, " ".join(text.split()))
    return text if len(text) <= 300 else text[:300] + " …"


def _without_data(word: re.Match[str]) -> str:
    """A long word, if it is one."""
    is_word = word[0].strip("\"'`[](){},.:;").replace("-", "").isalpha()
    return word[0] if is_word else "…"


def _read_tokenizer(
    tokenizer_json: str | Path, vocab_size: int, end_token_ids: Sequence[TokenId]
) -> LLTokenizer | Unsupported:
    text = tokenizer_json
    if isinstance(text, Path) or not text.lstrip().startswith("{"):
        text = Path(text).read_text(encoding="utf-8")
    ends = [int(token_id) for token_id in end_token_ids]
    for size in (vocab_size, None):  # a tokenizer may have tokens that its model has no logits for
        try:
            return LLTokenizer(text, n_vocab=size, eos_token=ends)
        except ValueError as error:
            fault = error
    return Unsupported(f"response_format: outputs of this model cannot be constrained: {fault}")
