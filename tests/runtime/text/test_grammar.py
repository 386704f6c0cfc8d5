"""What an output may look like: compiled by llguidance and followed token by token."""

import json
import random
import threading
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.grammar import Grammar, GrammarCompiler, GrammarMatcher
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from ferrum_rt.runtime.text import grammar as grammar_module
from ferrum_rt.runtime.text.grammar import LlGrammarCompiler
from tests.fakes.executor import EOS, VOCAB_SIZE
from tests.fakes.grammar import FakeGrammarCompiler
from tests.json_schemas import FORMATS, json_schemas
from tests.runtime.text.grammars import (
    ENDS,
    NUM_LOGITS,
    NUM_TOKENS,
    TOKENIZER,
    Kind,
    accepts,
    after,
    allowed,
    compile_format,
    compiler,
    encode,
    tokenizer,
)

# -- definitions ----------------------------------------------------------------------------------------------------------

OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ARITHMETIC = 'start: start "+" term | term\nterm: /[0-9]+/ | "(" start ")"'


@pytest.mark.parametrize(
    ("kind", "definition", "good", "bad"),
    [
        ("json_object", None, ['{"a": [1, {"b": null}]}', "{}"], ["[]", "1", "{", "{} x"]),
        ("json_schema", OBJECT, ['{"a":1}', '{"a": -20, "b": "é"}', '{\n  "a": 1\n}'], ['{"a":"x"}', "{}", ' {"a":1}']),
        ("json_schema", json.dumps(OBJECT), ['{"a":1}'], ["{}"]),
        ("json_schema", {}, ["[1]", '"x"', "null"], ["nul", "[1"]),
        ("regex", r"[ab]{2,3}/\d", ["ab/1", "bbb/9"], ["a/1", "ab/", "ab/1 "]),
        ("regex", "a\n\\\\", ["a\n\\"], ["a"]),
        ("regex", "", [""], ["x"]),
        ("grammar", ARITHMETIC, ["1+(2+3)", "7"], ["1+", "(1", "1 + 2"]),
        ("grammar", "start: %json " + json.dumps(OBJECT) + ' "!"', ['{"a":1}!'], ['{"a":1}']),
    ],
)
def test_an_output_follows_its_definition(kind: Kind, definition: Any, good: list[str], bad: list[str]) -> None:
    """Whole outputs of each kind of definition may end, and others may not."""
    grammar = compile_format(kind, definition)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_whitespace_is_bounded(kind: Kind) -> None:
    """Between the parts of JSON there is room for an indentation, but not for ever."""
    grammar = compile_format(kind, None if kind == "json_object" else OBJECT)
    assert accepts(grammar, '{\n    "a": 1\n}')
    assert not accepts(grammar, '{   "a": 1}')
    assert not accepts(grammar, "{\n" + " " * 40 + '"a": 1}')


def test_an_additional_property_cannot_take_the_name_of_another() -> None:
    """No escape spells the name of a property that has a schema of its own."""
    schema = OBJECT | {"additionalProperties": {"type": "string"}}
    assert accepts(compile_format("json_schema", schema), '{"a": 1, "b": "x"}')
    assert not accepts(compile_format("json_schema", schema), '{"a": 1, "\\u0061": "x"}')


BAD: dict[str, tuple[Kind, Any, str]] = {
    "no grammar": ("text", None, "text needs no grammar"),
    "a definition where none belongs": ("json_object", {"type": "object"}, "json_object has no definition"),
    "no schema": ("json_schema", None, "json_schema needs a definition"),
    "no regex": ("regex", None, "regex needs a definition"),
    "no rules": ("grammar", None, "grammar needs a definition"),
    "regex is a dict": ("regex", {"a": 1}, "must be a string"),
    "grammar is a dict": ("grammar", {"a": 1}, "must be a string"),
    "schema is a list": ("json_schema", "[1]", "must be a JSON object"),
    "schema is no JSON": ("json_schema", '{"type": ', "not valid JSON"),
    "schema is no type of JSON": ("json_schema", {"const": b"x"}, "cannot be written as JSON"),
    "schema has a key that is no string": ("json_schema", {1: 2}, "key that is not a string"),
    "schema has NaN": ("json_schema", {"minimum": float("nan")}, "cannot be written as JSON"),
    "schema has a wrong type": ("json_schema", {"type": "strin"}, "strin"),
    "schema has no types": ("json_schema", {"type": [], "anyOf": None}, "anyOf"),
    "schema has a multiple beyond floats": ("json_schema", {"multipleOf": 10**400}, "multipleOf"),
    "schema has no multiple": ("json_schema", {"multipleOf": 0}, "multipleOf"),
    "schema has wrong items": ("json_schema", {"type": "array", "minItems": -1}, "minItems"),
    "unsupported keywords": ("json_schema", {"not": {}, "if": {}}, r"unsupported keywords: \[\"if\", \"not\"\]"),
    "unsupported uniqueItems": ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    "unsupported oneOf": ("json_schema", {"oneOf": [{"type": "number"}, {"type": "number"}]}, "oneOf"),
    "unknown format": ("json_schema", {"type": "string", "format": "nonsense"}, "nonsense"),
    "contradiction": ("json_schema", {"allOf": [{"type": "string"}, {"type": "null"}]}, "[Uu]nsatisfiable"),
    "endless": ("json_schema", {"$ref": "#"}, "cannot be met"),
    "ref to nowhere": ("json_schema", {"$ref": "#/$defs/a"}, "leads to no schema"),
    "ref to a number": ("json_schema", {"$ref": "#/const", "const": 1}, "leads to no schema"),
    "ref to the net": ("json_schema", {"$ref": "https://example.com/a.json"}, "must be"),
    "nested id": ("json_schema", {"type": "array", "items": {"$id": "x"}}, r"\$id"),
    "regex unclosed": ("regex", "(a", "unclosed"),
    "regex with look-around": ("regex", "(?=a)b", "look-around"),
    "regex with a reference": ("regex", r"(a)\1", "backreferences"),
    "regex that matches nothing": ("regex", r"[^\s\S]", "cannot be met"),
    "lone surrogate": ("regex", "\ud800", "Unicode"),
    "lone surrogate in a schema": ("json_schema", {"const": "\ud800"}, "Unicode"),
    "lone surrogate in a grammar": ("grammar", 'start: "\ud800"', "Unicode"),
    "grammar without a start": ("grammar", 'x: "a"', "start"),
    "grammar with an unknown rule": ("grammar", "start: x", "x"),
    "grammar in JSON": ("grammar", '{"grammars": []}', "expecting rule"),
    "grammar with half a schema": ("grammar", 'start: %json {"a": ', "invalid JSON"),
    "grammar with a bad schema": ("grammar", 'start: %json {"$ref": "#/a"}', "leads to no schema"),
    "grammar that nothing meets": ("grammar", "start: start", "cannot be met"),
}


@pytest.mark.parametrize(("kind", "definition", "message"), BAD.values(), ids=BAD)
def test_a_wrong_definition_is_refused(kind: Kind, definition: Any, message: str) -> None:
    """The error names the field, says what is wrong, and quotes little."""
    with pytest.raises(RequestValidationError, match=message) as caught:
        compile_format(kind, definition)
    assert str(caught.value).startswith("response_format: ")
    assert len(str(caught.value)) < 400


# -- matchers -------------------------------------------------------------------------------------------------------------


def test_several_end_tokens_are_allowed_where_the_output_may_end() -> None:
    """Where the output may end, all end tokens are allowed; where it must, nothing else is; and nowhere else any is."""
    grammar = compile_format("regex", "ab?")
    assert not ENDS & allowed(grammar.start())
    assert allowed(after(grammar, encode("a"))) == ENDS | set(encode("b"))
    assert allowed(after(grammar, encode("ab"))) == ENDS


@pytest.mark.parametrize("text", ["a", "ab"])
def test_after_the_end_anything_is_taken(text: str) -> None:
    """Once an end token was taken, or nothing could follow, further tokens are ignored, and the end tokens are allowed."""
    matcher = after(compile_format("regex", "ab?"), [*encode(text), TokenId(3), TokenId(77), TokenId(1), TokenId(-1)])
    assert allowed(matcher) == ENDS
    forced = after(compile_format("regex", "ab"), [*encode("ab"), TokenId(77)])
    assert allowed(forced) == ENDS


@pytest.mark.parametrize("wrong", [encode("x")[0], TokenId(-1), TokenId(2**40), TokenId(0), TokenId(NUM_LOGITS - 1)])
def test_a_token_that_is_not_allowed_fails_its_matcher_alone(wrong: TokenId) -> None:
    """Another letter, a special token, and ids outside of the vocabulary raise, without a word about the output."""
    grammar = compile_format("regex", "secret{1,9}")
    matcher, other = after(grammar, encode("secre")), after(grammar, encode("secre"))
    with pytest.raises(RequestValidationError, match="response_format") as caught:
        matcher.advance(wrong)
    assert "secre" not in str(caught.value)
    assert allowed(other) == set(encode("t"))
    assert compile_format("regex", "secret{1,9}") is grammar


def test_a_failed_matcher_stays_failed() -> None:
    """Whatever is asked of it afterwards raises."""
    matcher = compile_format("regex", "a").start()
    for _ in range(2):
        with pytest.raises(RequestValidationError):
            matcher.advance(encode("x")[0])
        with pytest.raises(RequestValidationError):
            allowed(matcher)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "definition", "text"),
    [
        ("json_schema", OBJECT, '{"a": 12, "b": [tr'),
        ("regex", r"(\w+ ){1,3}x?", "one two"),
        ("grammar", ARITHMETIC, "1+(2"),
    ],
)
def test_the_mask_says_what_advance_takes(kind: Kind, definition: Any, text: str) -> None:
    """In every state on the way, tokens in the mask can be taken, and others cannot."""
    grammar, tokens, rng = compile_format(kind, definition), encode(text), random.Random(1)
    for length in range(len(tokens) + 1):
        mask = allowed(after(grammar, tokens[:length]))
        others = set(range(NUM_LOGITS)) - mask
        for token_id in rng.sample(sorted(mask), min(len(mask), 30)):
            after(grammar, tokens[:length]).advance(TokenId(token_id))
        for token_id in rng.sample(sorted(others), 30):
            with pytest.raises(RequestValidationError):
                after(grammar, tokens[:length]).advance(TokenId(token_id))


def test_matchers_of_one_grammar_are_independent() -> None:
    """A second output, and one replayed after a preemption, start from the beginning."""
    grammar = compile_format("json_schema", OBJECT)
    first = after(grammar, encode('{"a": 1'))
    beginning = allowed(grammar.start())
    assert beginning != allowed(first)
    assert allowed(after(grammar, encode('{"a": 1'))) == allowed(first)
    assert allowed(grammar.start()) == beginning


def test_a_mask_of_32_bit_words_is_filled() -> None:
    """The caller's memory may have any item type; no byte of it keeps its old value."""
    words = memoryview(bytearray(b"\xff" * 520)).cast("i")
    compile_format("regex", "a").start().write_mask(words)
    assert int.from_bytes(words.tobytes(), "little") == 1 << encode("a")[0]


@pytest.mark.parametrize("num_logits", [NUM_TOKENS - 200, NUM_TOKENS - 195, NUM_TOKENS, NUM_TOKENS + 1])
def test_vocabulary_and_logits_of_different_lengths(num_logits: int) -> None:
    """A model may have logits for fewer tokens than its tokenizer knows, or for more; the mask is as long as the logits."""
    other = LlGrammarCompiler(TOKENIZER.read_text(encoding="utf-8"), num_logits, [TokenId(1)])
    matcher = other.compile(ResponseFormat(type="regex", definition=".*")).start()
    tokens = allowed(matcher, num_logits)
    assert num_logits - 100 < max(tokens) < min(num_logits, NUM_TOKENS)
    with pytest.raises(RequestValidationError, match="not in the vocabulary"):
        matcher.advance(TokenId(num_logits))


@pytest.mark.parametrize(("text", "ends"), [("{}", [1]), (TOKENIZER, []), (TOKENIZER, [NUM_TOKENS])])
def test_a_tokenizer_that_does_not_do_is_told(text: str | Path, ends: list[int]) -> None:
    """A tokenizer that llguidance cannot read, and a model without an end, cannot be constrained."""
    with pytest.raises(Unsupported, match="response_format"):
        LlGrammarCompiler(text, NUM_TOKENS, [TokenId(end) for end in ends]).compile(ResponseFormat(type="json_object"))


# -- the cache ------------------------------------------------------------------------------------------------------------


def test_the_same_definition_is_compiled_once() -> None:
    """As text or as a dict, in whatever spacing; but the order of properties is part of what it says."""
    grammar = compile_format("json_schema", {"properties": {"a": {}, "b": {}}})
    assert compile_format("json_schema", '{"properties": {"a": {},\n "b": {}}}') is grammar
    assert compile_format("json_schema", {"properties": {"b": {}, "a": {}}}) is not grammar
    assert compile_format("regex", "start: a") is not compile_format("grammar", 'start: "a"')


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of grammars and by the size of their definitions; whichever was used last stays longest."""
    own = LlGrammarCompiler(TOKENIZER, NUM_TOKENS, [TokenId(1)])

    def get(text: str) -> Grammar:
        return own.compile(ResponseFormat(type="regex", definition=text))

    monkeypatch.setattr(grammar_module, "MAX_CACHED_GRAMMARS", 2)
    first, second = get("1"), get("2")
    assert get("1") is first
    third = get("3")
    assert (get("1"), get("3")) == (first, third)
    assert get("2") is not second
    monkeypatch.setattr(grammar_module, "MAX_CACHED_GRAMMARS", 100)
    monkeypatch.setattr(grammar_module, "MAX_CACHED_BYTES", 2_000)
    first = get("1" * 500)
    assert get("1" * 500) is first
    get("2" * 1_500)
    assert get("1" * 500) is not first


def test_a_grammar_that_has_outgrown_its_limits_is_compiled_anew() -> None:
    """Outputs share the automaton that they explore. Once it is full, its outputs fail; the next request has a fresh one."""
    kind: Kind = "regex"
    text = "(((a{1,100}){1,100}){1,100}){1,100}"
    grammar = compile_format(kind, text)
    matcher = grammar.start()

    def run() -> None:
        for _ in range(1_000):
            matcher.advance(encode("a")[0])
            allowed(matcher)

    with pytest.raises(RequestValidationError, match="too complex"):
        run()
    with pytest.raises(RequestValidationError, match="too complex"):
        allowed(matcher)
    fresh = compile_format(kind, text)
    assert fresh is not grammar
    assert encode("a")[0] in allowed(fresh.start())


@pytest.mark.slow
def test_three_threads() -> None:
    """One thread compiles, one starts outputs, and one runs them."""
    outputs: list[str] = []
    grammars = [compile_format("regex", f"(ab){{{count}}}") for count in range(1, 20)]
    stop = threading.Event()

    def compile_others() -> None:
        for count in range(1, 300):
            compiler().compile(ResponseFormat(type="regex", definition=f"[xy]{{{count}}}"))
        stop.set()

    def run(matchers: list[GrammarMatcher]) -> None:
        for matcher in matchers:
            text = ""
            while not (tokens := allowed(matcher)) & ENDS:
                matcher.advance(TokenId(max(tokens)))
                text += tokenizer().decode([max(tokens)])
            outputs.append(text)

    compiling = threading.Thread(target=compile_others)
    compiling.start()
    while not stop.is_set():
        running = threading.Thread(target=run, args=([grammar.start() for grammar in grammars],))
        running.start()
        running.join()
    compiling.join()
    assert set(outputs) == {"ab" * count for count in range(1, 20)}


# -- schemas --------------------------------------------------------------------------------------------------------------

# A walk that takes these more often ends: it closes what it has opened, and gets beyond the name in an address.
CLOSING = {token_id for token_id in map(tokenizer().token_to_id, '"}]@') if token_id is not None}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(schema=json_schemas(), seed=st.integers(0, 2**32))
def test_random_outputs_meet_random_schemas(schema: dict[str, Any], seed: int) -> None:
    """Whatever is chosen among the allowed tokens, the output is JSON that the schema takes, and never are none allowed."""
    rng, matcher, tokens = random.Random(seed), compile_format("json_schema", schema).start(), list[int]()
    while True:
        choice = allowed(matcher)
        assert choice
        if choice & ENDS and (choice <= ENDS or rng.random() < 0.7):
            break
        closing = sorted(choice & CLOSING)
        token_id = rng.choice(closing if closing and rng.random() < 0.5 else sorted(choice - ENDS))
        matcher.advance(TokenId(token_id))
        tokens.append(token_id)
        assert len(tokens) < 1_000, "the walk does not end"
    text = tokenizer().decode(tokens, skip_special_tokens=False)

    def exactly(number: str) -> Decimal | float:
        try:
            return Decimal(number)  # floats have no exact multiples
        except InvalidOperation:  # an exponent beyond all bounds
            return float(number)

    checker = jsonschema.FormatChecker(formats=FORMATS)
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text, parse_float=exactly))


# -- the fake -------------------------------------------------------------------------------------------------------------


def test_the_fake_keeps_the_contract() -> None:
    """One literal text, then the end; another token raises, and so does a format that it does not take."""
    fake: GrammarCompiler = FakeGrammarCompiler()
    matcher = fake.compile(ResponseFormat(type="regex", definition="hi")).start()
    for token_id in (*b"hi", EOS):
        assert allowed(matcher, VOCAB_SIZE) == {token_id}
        matcher.advance(TokenId(token_id))
    matcher.advance(TokenId(7))
    assert allowed(matcher, VOCAB_SIZE) == {EOS}
    with pytest.raises(RequestValidationError):
        fake.compile(ResponseFormat(type="regex", definition="hi")).start().advance(EOS)
    with pytest.raises(RequestValidationError, match="response_format"):
        fake.compile(ResponseFormat(type="json_object"))
