"""Tool calls: which format a model has, and calls in a text that comes in pieces."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ferrum_rt
from ferrum_rt.interfaces.types import ToolCallDelta
from ferrum_rt.runtime.text.tool_calls import (
    HERMES,
    LLAMA,
    MAX_DEPTH,
    MISTRAL,
    ToolCallParser,
    ToolFormat,
    detect_format,
)

FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}
DEMO = Path(ferrum_rt.__file__).parent / "demo_model"
every_format = pytest.mark.parametrize("tool_format", FORMATS.values(), ids=FORMATS)

# -- formats ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("""'<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson""", HERMES),
        ("""'{"name": <name>, "parameters": ' '<tool_call>' call.arguments 'ipython'""", HERMES),
        ("""'[TOOL_CALLS] [' + call.function | tojson + ']'""", MISTRAL),
        ("""'<|start_header_id|>ipython' '{"name": "' + call.name + '", ' + '"parameters": '""", LLAMA),
        ("""'<|python_tag|>' 'Environment: ipython' '"parameters": '""", LLAMA),
        # Other ways to write calls: XML, names without JSON, Python.
        ("""'<tool_call>\\n<function=' + call.name + '>' call.arguments""", None),
        ("""'<tool_call>' + call.name '<arg_key>' call.arguments""", None),
        ("""'[TOOL_CALLS]' + call.name + '[ARGS]' + call.arguments""", None),
        ("""'Environment: ipython' '[func_name1(params_name1=params_value1)]'""", None),
        ("""{% for message in messages %}{{ message.content }}{% endfor %}""", None),
        ("", None),
    ],
)
def test_formats_of_chat_templates(source: str, expected: ToolFormat | None) -> None:
    """A chat template shows in which format its model writes calls, if in one that we know."""
    assert detect_format(source) == expected


def test_demo_model_has_no_format() -> None:
    """The demo model has never seen a tool."""
    assert detect_format(json.loads((DEMO / "tokenizer_config.json").read_bytes())["chat_template"]) is None


@every_format
def test_formats_are_what_the_parser_relies_on(tool_format: ToolFormat) -> None:
    """A marker's first character is nowhere else in it; what may follow a call can be told by its first character."""
    assert tool_format.marker.count(tool_format.marker[0]) == 1
    following = [text.strip()[0] for text in (tool_format.separator, tool_format.closing) if text]
    assert following
    assert len(set(following)) == len(following)
    assert tool_format.marker in tool_format.markers


# -- parsing ---------------------------------------------------------------------------------------------------------------

CHARACTERS = st.characters(exclude_categories=["Cs"])
WHITE = st.text(" \t\n\r", max_size=2)
WORDS = st.text(CHARACTERS, min_size=1, max_size=8) | st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS][", "<|python_tag|>", '{"name": "f"}', "}]}", '\\"', "é🙂", "\x00\n"]
)
ARGUMENTS = st.dictionaries(
    WORDS,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS | st.just(""),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)


class WrittenCall(msgspec.Struct):
    """A call as a model may write it. ``given_at`` is where in ``source`` it is known to be one, ``arguments_at`` where its
    arguments begin."""

    name: str
    value: Any
    arguments: str
    source: str = ""
    given_at: int = 0
    arguments_at: int = 0


@st.composite
def written_calls(draw: st.DrawFn, *, may_have_others: bool) -> WrittenCall:
    """With members in any order, white space anywhere, and further members where these are let pass."""
    name, value = draw(WORDS), draw(ARGUMENTS)
    ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 0, 2]))
    call = WrittenCall(name, value, json.dumps(value, ensure_ascii=ascii_only, indent=indent))
    members = [
        ("name", json.dumps(name, ensure_ascii=ascii_only)),
        (draw(st.sampled_from(["arguments", "parameters"])), call.arguments),
    ]
    if may_have_others and draw(st.booleans()):
        members.append(("x" + draw(WORDS), json.dumps(draw(ARGUMENTS | st.integers() | WORDS))))
    if draw(st.booleans()):
        members.append(("id", '"x"'))
    call.source = "{" + draw(WHITE)
    for index, (key, written) in enumerate(draw(st.permutations(members))):
        call.source += ("," if index else "") + draw(WHITE) + json.dumps(key) + draw(WHITE) + ":" + draw(WHITE)
        if key in ("arguments", "parameters"):
            call.arguments_at = len(call.source)
            call.given_at = max(call.given_at, len(call.source) + 1)
        elif key == "name":
            call.given_at = max(call.given_at, len(call.source + written))
        call.source += written + draw(WHITE)
    call.source += "}"
    return call


# Almost calls, so that much is held back and let go again.
TEXTS = st.lists(
    st.sampled_from(
        ["<tool", "<", "</tool_call>", "[", "TOOL_CALLS]", "<|python_tag", "{", '"name"', "}", "\n", " ", "é🙂", "x"]
    ),
    max_size=6,
).map("".join)


@st.composite
def written_outputs(draw: st.DrawFn, tool_format: ToolFormat, max_turns: int = 3) -> list[str | WrittenCall]:
    """Text, and calls with the frames around them (as text that is to be dropped), in turns."""
    parts: list[str | WrittenCall] = []
    for _ in range(draw(st.integers(0, max_turns))):
        text = draw(TEXTS.filter(lambda text: tool_format.marker not in text))
        has_marker = not tool_format.is_bare or bool(parts) or draw(st.booleans())
        if tool_format.is_bare:  # after a call such text goes on with the calls; before one it is the beginning of one
            text = "x" + text if has_marker else ""
        num_calls = 1 if tool_format.separator is None else draw(st.integers(1, 3))
        calls = [draw(written_calls(may_have_others=has_marker)) for _ in range(num_calls)]
        frame = [tool_format.marker, tool_format.opening.strip()] if has_marker else [""]
        for index, call in enumerate(calls):
            before = frame if index == 0 else [(tool_format.separator or "").strip()]
            start = "".join(literal + draw(WHITE) for literal in before)
            call.source = start + call.source
            call.given_at += len(start)
            call.arguments_at += len(start)
        calls[-1].source += draw(WHITE) + tool_format.closing.strip() if tool_format.closing.strip() else ""
        parts += [text, *calls]
    return [*parts, "x" + draw(TEXTS.filter(lambda text: tool_format.marker not in text))]


def source_of(parts: Sequence[str | WrittenCall]) -> str:
    return "".join(part if isinstance(part, str) else part.source for part in parts)


def pieces_of(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def parse(tool_format: ToolFormat, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the name and arguments of each call; what is said of calls in pieces is what is said at the end."""
    parser = ToolCallParser(tool_format)
    results = [*(parser.push(piece) for piece in pieces), parser.flush()]
    assert parser.flush() == ("", [])
    joined = join_deltas([delta for _, deltas in results for delta in deltas])
    assert joined == [(call.id, call.function.name, call.function.arguments) for call in parser.calls]
    for _, deltas in results:
        assert len({delta.index for delta in deltas}) == len(deltas)
    return "".join(text for text, _ in results), [(name, arguments) for _, name, arguments in joined]


def join_deltas(deltas: Sequence[ToolCallDelta]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call. Id and name must come once, at its start."""
    calls: list[tuple[str, str, str]] = []
    for delta in deltas:
        if delta.index == len(calls):
            assert delta.id
            assert delta.name
            calls.append((delta.id, delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1
            assert delta.id is None
            assert delta.name is None
            assert delta.arguments
            calls[-1] = (*calls[-1][:2], calls[-1][2] + delta.arguments)
    return calls


@pytest.mark.slow
@every_format
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_calls_come_back_however_cut(tool_format: ToolFormat, data: st.DataObject) -> None:
    """The text and the calls of an output are those put in, with the arguments exactly as written, however it is cut."""
    parts = data.draw(written_outputs(tool_format))
    text = source_of(parts)
    calls = [part for part in parts if isinstance(part, WrittenCall)]
    expected = "".join(part for part in parts if isinstance(part, str)), [(call.name, call.arguments) for call in calls]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    for pieces in (
        [text],
        list(text),
        [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)],
    ):
        assert parse(tool_format, pieces) == expected
    assert [json.loads(arguments) for _, arguments in expected[1]] == [call.value for call in calls]


@pytest.mark.slow
@every_format
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_cut_off_anywhere(tool_format: ToolFormat, data: st.DataObject) -> None:
    """Wherever an output ends, what went out is all of its text; of the call that it ends in, the arguments as far as they
    came, or before they begin, what was written of it as text. Nothing comes later than it could."""
    parts = data.draw(written_outputs(tool_format, max_turns=1))
    parser = ToolCallParser(tool_format)
    text, deltas, start = "", list[ToolCallDelta](), 0
    before_text, before_calls = "", list[tuple[str, str]]()
    for part in parts:
        source = part if isinstance(part, str) else part.source
        for end in range(len(source) + 1):
            calls, rest = before_calls, source[:end]
            if isinstance(part, WrittenCall) and end >= part.given_at:
                calls = [*calls, (part.name, source[part.arguments_at : end][: len(part.arguments)])]
                rest = ""
            found = join_deltas(deltas)
            assert [(name, arguments) for _, name, arguments in found] == calls
            whole = source_of(parts)[: start + end]
            assert parse(tool_format, [whole]) == (before_text + rest, calls)
            held = (before_text + rest).removeprefix(text)
            if isinstance(part, str):
                assert tool_format.marker.startswith(held)
            elif end >= part.given_at:
                assert held == ""
            if end < len(source):
                out, new = parser.push(source[end])
                text += out
                deltas += new
        start += len(source)
        if isinstance(part, str):
            before_text += part
        else:
            before_calls = [*before_calls, (part.name, part.arguments)]


JUNK = st.lists(
    st.sampled_from(
        [
            "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[", "]", "{", "}", ",", ":", ";", " ", "\n",
            '"name"', '"arguments"', '"parameters"', '"f"', '"', "\\", "\\u00e", "{}", '{"a": 1}', "1", "-", ".5", "e9",
            "true", "nul", "é", "<", '{"name":"f","arguments":{', '{"name":"f","arguments":{}}', "\x00",
        ]
    ),
    max_size=20,
)  # fmt: skip


def is_within(part: str, whole: str) -> bool:
    """Whether ``part`` is what is left of ``whole`` when some of its characters are dropped."""
    characters = iter(whole)
    return all(character in characters for character in part)


@pytest.mark.slow
@every_format
@settings(max_examples=300, deadline=None)
@given(pieces=JUNK)
def test_junk(tool_format: ToolFormat, pieces: list[str]) -> None:
    """Whatever a model writes, it is read the same however it is cut; text is as written and in order, and all of it is text
    where there is no call."""
    source = "".join(pieces)
    text, calls = parse(tool_format, pieces)
    assert (text, calls) == parse(tool_format, [source]) == parse(tool_format, list(source))
    assert is_within(text, source)
    assert calls or text == source
    for _, arguments in calls:
        assert arguments == "{}" or arguments in source


def is_call(body: str) -> bool:
    """Whether JSON, by the standard library's reader, is a call."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        members = json.loads(body, object_pairs_hook=lambda pairs: pairs or {}, parse_constant=refuse)
    except ValueError:
        return False
    if not isinstance(members, list) or not all(isinstance(member, tuple) for member in members):
        return False
    names = [value for key, value in members if key == "name"]
    arguments = [value for key, value in members if key in ("arguments", "parameters")]
    are_objects = all(value == {} or (isinstance(value, list) and isinstance(value[0], tuple)) for value in arguments)
    if len(names) != 1 or not isinstance(names[0], str) or len(arguments) > 1 or not are_objects:
        return False
    return names[0] != "" and not any("\ud800" <= character <= "\udfff" for character in names[0])


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


MUTATIONS = st.lists(
    st.tuples(st.integers(0, 200), st.sampled_from(['"', "\\", "{", "}", "[", ",", ":", "0", "-", ".", "e", "x", "\n", ""])),
    max_size=2,
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(call=written_calls(may_have_others=True), mutations=MUTATIONS)
def test_calls_are_strict_json(call: WrittenCall, mutations: list[tuple[int, str]]) -> None:
    """What is taken for a whole call is exactly what the standard library reads as one, but for NaN and the like."""
    body = call.source
    for where, character in mutations:
        where %= len(body)
        body = body[:where] + character + body[where + 1 :]
    # The control character ends a string that a mutation has left open.
    text, calls = parse(HERMES, [f"<tool_call>{body}</tool_call>\x00"])
    assert (text == "\x00" and all(is_json(arguments) for _, arguments in calls)) == is_call(body)


@pytest.mark.parametrize(
    ("tool_format", "source", "text", "calls"),
    [
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "\\u00e9\\"", "why": [{"name": "g"}], "arguments": {}}</tool_call>',
            "",
            [('é"', "{}")],
        ),
        (LLAMA, ' \n{"type": "function", "name": "f", "parameters": {"a": 1}}; \n', "; \n", [("f", '{"a": 1}')]),
        (LLAMA, '{"name": "f", "parameters": {}};{"name": "g", "parameters": {}}\n', "", [("f", "{}"), ("g", "{}")]),
        (LLAMA, '<|python_tag|>{"name": "f"}', "", [("f", "{}")]),
        (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}]', "", [("f", "{}")]),
        (MISTRAL, '[TOOL_CALLS]\n[ {"name": "f"} , {"name": "g"} ]!', "!", [("f", "{}"), ("g", "{}")]),
    ],
)
def test_calls_by_hand(tool_format: ToolFormat, source: str, text: str, calls: list[tuple[str, str]]) -> None:
    """What models write besides the bare minimum."""
    assert parse(tool_format, [source]) == (text, calls)


@pytest.mark.parametrize(
    ("tool_format", "source"),
    [
        (HERMES, "<tool_call>\n</tool_call>"),
        (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": [{}]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}, "parameters": {}, "name": "f"}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {"a": 01}, "name": "f"}</tool_call>'),
        (HERMES, "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>"),
        (HERMES, '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>'),
        (HERMES, '{"name": "f", "arguments": {}}'),
        (LLAMA, '{"name": "Bob"}'),
        (LLAMA, '{"name": "Bob", "age": 4, "parameters": {}}'),
        (LLAMA, '[{"name": "f", "parameters": {}}]'),
        (LLAMA, 'Call {"name": "f", "parameters": {}}'),
        (LLAMA, '<|python_tag|>search.call(query="x")'),
        (LLAMA, " \n"),
        (MISTRAL, '[TOOL_CALLS]{"name": "f", "arguments": {}}'),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}'),
        (MISTRAL, "[TOOL_CALLS] []"),
    ],
)
def test_no_calls(tool_format: ToolFormat, source: str) -> None:
    """What is no well-formed call goes out as text, exactly as written."""
    assert parse(tool_format, [source]) == (source, [])


@pytest.mark.parametrize(
    ("source", "text", "calls"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": tru!}}</tool_call>', "!}}</tool_call>", [("f", '{"a": tru')]),
        ('<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>', "}\n</tool_call>", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}} oops</tool_call>', " oops</tool_call>", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}, "id": 1.x}', ', "id": 1.x}', [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g"}', "\n", [("f", "{}"), ("g", "{}")]),
        ('<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1<tool_call>{"name": "g"}', "", [("f", '{"a": 1'), ("g", "{}")]),
    ],
)
def test_broken_off_calls(source: str, text: str, calls: list[tuple[str, str]]) -> None:
    """From where a call breaks off all is text again, until the next call, even if the one before was not closed."""
    assert parse(HERMES, [source]) == parse(HERMES, list(source)) == (text, calls)


# fmt: off
WRONG_LEXEMES = [
    "-", "01", "1.", ".5", "1e", "1e+", "+1", "1.e1", "--1", "1-", "t", "tru", "truth", "nul", "falsey", "None", "NaN",
    r'"\x"', r'"\u"', r'"\u1"', r'"\u12"', r'"\u123"', r'"\u123g"', '"\t"', "'a'",
    "{1: 2}", '{"a"}', '{"a":}', "{,}", "[,]", "[1,]", "[1 2]", "[1:2]", "[}",
]
# fmt: on


@pytest.mark.parametrize("lexeme", WRONG_LEXEMES)
def test_lexemes_that_are_not_json(lexeme: str) -> None:
    """Numbers, words and strings are held to the letter of JSON, whatever follows them."""
    for after in (' , "name": "f"}', ',"name":"f"}', "}"):
        source = f'<tool_call>{{"arguments": {{}}, "x": {lexeme}{after}</tool_call>'
        assert parse(HERMES, [source]) == (source, [])


@pytest.mark.parametrize(
    "lexeme", ["-0", "0.50e-10", "120", "1E+9", "true", "false", "null", r'"\u00Ea\/\b"', "[ ]", "{ }", "[[], 1]"]
)
def test_lexemes_of_json(lexeme: str) -> None:
    """All that JSON has may stand in a call."""
    assert parse(HERMES, [f'<tool_call>{{"arguments": {{"x":{lexeme}}}, "name": "f"}}</tool_call>']) == (
        "",
        [("f", f'{{"x":{lexeme}}}')],
    )


def nested(depth: int) -> str:
    """A call whose object has others in it, ``depth`` with itself."""
    return '{"name": "f", "arguments": ' + '{"a": ' * (depth - 2) + "{}" + "}" * (depth - 2) + "}"


def test_depth_is_bounded() -> None:
    """Brackets may be nested to MAX_DEPTH; what is nested deeper is no call, and does no harm."""
    [(_, arguments)] = parse(HERMES, [f"<tool_call>{nested(MAX_DEPTH)}</tool_call>"])[1]
    assert json.loads(arguments) == json.loads(nested(MAX_DEPTH))["arguments"]
    text, [(_, arguments)] = parse(HERMES, [f"<tool_call>{nested(MAX_DEPTH + 1)}</tool_call>"])
    assert arguments == '{"a": ' * (MAX_DEPTH - 1)
    assert text == nested(MAX_DEPTH + 1)[len('{"name": "f", "arguments": ') + len(arguments) :] + "</tool_call>"
    source = '<tool_call>{"arguments": ' + "[" * 100_000
    assert parse(HERMES, [source]) == (source, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 1_000_000,
        '<tool_call>{"arguments": {"a": "' + "x" * 1_000_000,
        '<tool_call>{"' + "x" * 1_000_000,
        '<tool_call>{"name": "f", "arguments": {"a": [' + "1," * 500_000,
        '<tool_call>{"name": "f"}</tool_call>' * 28_000,
        '<tool_call>{"name":' * 53_000,
        "<tool_cal" * 111_000,
    ],
    ids=["value", "held", "key", "list", "calls", "broken", "text"],
)
def test_a_megabyte_is_fast(source: str) -> None:
    """A long output in many pieces takes seconds at most: time in proportion to its length."""
    parser = ToolCallParser(HERMES)
    start = time.process_time()
    for piece in pieces_of(source, 4):
        parser.push(piece)
    parser.flush()
    assert time.process_time() - start < 15.0
