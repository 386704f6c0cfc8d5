"""Tool calls: how models write them, a grammar that makes a model write them, and what it wrote, read as it comes."""

import enum
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec

from ferrum_rt.interfaces.types import (
    FunctionCall,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolFunction,
)

MAX_DEPTH = 128
"""Brackets that may be open at once in a call; what is nested deeper is text."""


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a model writes calls: ``marker``, ``opening``, calls with a ``separator`` between them, ``closing``. Without a
    separator every call has all of these around it. A call is a JSON object with its name and, under ``arguments_key``, its
    arguments. With ``is_bare`` the marker may be missing where the output begins with a call.

    The white space is what models are trained on; in reading it is not minded. The first character of ``marker`` is nowhere
    else in it, and ``closing`` and ``separator`` differ in their first that is not white.
    """

    marker: str
    opening: str = ""
    separator: str | None = None
    closing: str = ""
    arguments_key: str = "arguments"
    is_bare: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The strings that may be single tokens of a model, and must not be missing from the text that is read."""
        return tuple(text for text in (self.marker, self.closing.strip()) if len(text) > 1)


HERMES = ToolFormat(marker="<tool_call>", opening="\n", closing="\n</tool_call>")
LLAMA = ToolFormat(marker="<|python_tag|>", separator="; ", arguments_key="parameters", is_bare=True)
MISTRAL = ToolFormat(marker="[TOOL_CALLS]", opening="[", separator=", ", closing="]")

# What a chat template has that teaches a format, and what it has if it goes on in another way: Qwen3-Coder and GLM write
# arguments as XML behind Hermes's marker, newer Mistrals the name without JSON.
_SIGNS: tuple[tuple[ToolFormat, tuple[str, ...], tuple[str, ...]], ...] = (
    (HERMES, ("<tool_call>", "arguments"), ("<function=", "<arg_key>")),
    (MISTRAL, ("[TOOL_CALLS]",), ("[ARGS]",)),
    (LLAMA, ('"parameters"', "ipython"), ("<tool_call>",)),
)


def detect_format(chat_template_source: str) -> ToolFormat | None:
    """The format that the model's chat template shows calls in; None if it is none that we know."""
    for tool_format, needed, foreign in _SIGNS:
        has = chat_template_source.__contains__
        if all(map(has, needed)) and not any(map(has, foreign)):
            return tool_format
    return None


# -- what makes a model call -----------------------------------------------------------------------------------------------

# A model could write white space for ever; this leaves it what it has learned, with a space after a sign or without one.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

# Where only one text can follow, llguidance would insist on the tokens that the tokenizer makes of it; with the name of a
# special token in that text, it insists on the special token and then refuses it.
_OPTIONS = {"no_forcing": True}


def tool_constraint(
    tool_format: ToolFormat, tools: Sequence[Tool], choice: ToolChoice, token_ids: Mapping[str, int]
) -> ResponseFormat:
    """The grammar of an output that is one or more calls (of a named function: exactly one) with arguments as their schemas
    say. ``choice`` demands a call, and it and the tools were checked with their request. ``token_ids`` are those of
    ``tool_format.markers`` that are single tokens. The grammar is as long as the tools."""
    allowed = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name]
    begin = ("" if tool_format.is_bare else tool_format.marker) + tool_format.opening
    between = f"{tool_format.closing}\n{begin}" if tool_format.separator is None else tool_format.separator
    more = [] if isinstance(choice, NamedTool) else ["(", *_lark(between, token_ids), "call", ")*"]
    rules = [
        ["%llguidance", json.dumps(_OPTIONS)],
        ["start:", *_lark(begin, token_ids), "call", *more, *_lark(tool_format.closing, token_ids)],
        ["call:", " | ".join(f"call_{index}" for index in range(len(allowed)))],
    ]
    for index, tool in enumerate(allowed):
        name = json.dumps(tool.function.name, ensure_ascii=False)
        head = json.dumps(f'{{"name": {name}, "{tool_format.arguments_key}": ')
        rules.append([f"call_{index}:", head, "%json", json.dumps(_schema(tool.function)), '"}"'])
    return ResponseFormat(type="grammar", definition="".join(" ".join(rule) + "\n" for rule in rules))


def _lark(text: str, token_ids: Mapping[str, int]) -> Iterator[str]:
    """The text in llguidance's Lark: strings, and markers that are single tokens by their id."""
    names = "|".join(map(re.escape, token_ids))
    for piece in re.split(f"({names})", text) if names else [text]:
        if piece:
            yield f"<[{token_ids[piece]}]>" if piece in token_ids else json.dumps(piece)


def _schema(function: ToolFunction) -> dict[str, Any]:
    """Of the arguments; a function without ``parameters`` takes none."""
    schema = function.parameters or {"additionalProperties": False}
    return {"x-guidance": _JSON_STYLE, **schema, "type": "object"}


# -- what a model wrote ----------------------------------------------------------------------------------------------------


class _State(enum.Enum):
    TEXT = "text"
    FRAME = "frame"  # between a marker and a call, and after a call
    CALL = "call"


class ToolCallParser:
    """Finds the calls in an output that comes in pieces. Takes time in proportion to the output, however it is cut.

    A call is known as one once its name and the start of its arguments are there; from then on its arguments go out as they
    come. What proves to be none, and what breaks off a call after that, goes out as text, exactly as it was written. A call
    may have other members too, which are dropped; but not where no marker stands before it, since any JSON may be an answer.
    """

    def __init__(self, tool_format: ToolFormat) -> None:
        self._marker = tool_format.marker
        self._opening, self._closing = tool_format.opening.strip(), tool_format.closing.strip()
        self._separator = (tool_format.separator or "").strip()
        self._calls: list[tuple[str, str, list[str]]] = []
        self._out: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._held: list[str] = []  # goes out as text if no call comes of it
        self._literal, self._num_matched = "", 0  # what is being matched, and how much of it is there
        self._is_marked = self._is_given = False
        self._begin_call()
        if not tool_format.is_bare:
            self._begin_text()

    @property
    def calls(self) -> list[ToolCall]:
        """All calls so far. The arguments of the last one may be cut off, as the output may be."""
        return [
            ToolCall(id=call_id, function=FunctionCall(name=name, arguments="".join(arguments)))
            for call_id, name, arguments in self._calls
        ]

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The text outside calls that may go out now, and what is new of calls: at most one delta for each."""
        position = 0
        while position < len(text):
            if self._state is _State.TEXT:
                position = self._scan_text(text, position)
            elif self._state is _State.FRAME:
                position = self._scan_frame(text, position)
            else:
                position = self._scan_call(text, position)
        return self._take()

    def flush(self) -> tuple[str, list[ToolCallDelta]]:
        """What was held back, when the output ends. Of a call that was given out nothing is: what is still held then is at
        most its frame, and a frame is no text whether whole or not."""
        if self._state is _State.TEXT or not self._is_given:
            self._out += [*self._held, self._literal[: self._num_matched]]
        self._begin_text()
        return self._take()

    def _take(self) -> tuple[str, list[ToolCallDelta]]:
        text = "".join(self._out)
        deltas = []
        for _, group in groupby(self._deltas, key=lambda delta: delta.index):
            first, *others = group
            arguments = "".join([first.arguments, *(delta.arguments for delta in others)])
            deltas.append(msgspec.structs.replace(first, arguments=arguments))
        self._out, self._deltas = [], []
        return text, deltas

    # Each of the three takes at least one character from ``position`` on, or changes the state, and returns where to go on.

    def _scan_text(self, text: str, position: int) -> int:
        if text[position] == self._marker[self._num_matched]:
            self._num_matched += 1
            if self._num_matched == len(self._marker):
                self._begin_frame()
            return position + 1
        if self._num_matched:  # none of these characters begins another marker: its first is nowhere else in it
            self._out.append(self._marker[: self._num_matched])
            self._num_matched = 0
            return position
        start = text.find(self._marker[0], position)
        end = len(text) if start < 0 else start
        self._out.append(text[position:end])
        return end

    def _scan_frame(self, text: str, position: int) -> int:
        character = text[position]
        if not self._num_matched:
            if character in _WHITE:
                self._held.append(character)
                return position + 1
            choices = (self._separator, self._closing) if self._is_given else (self._opening,)
            self._literal = next((literal for literal in choices if literal[:1] == character), "")
        if not self._literal or self._literal[self._num_matched] != character:
            self._give_up()
            return position
        self._num_matched += 1
        if self._num_matched == len(self._literal):
            if self._is_given and self._literal == self._closing:
                self._begin_text()
            else:
                self._held.append(self._literal)
                self._begin_call()
        return position + 1

    def _scan_call(self, text: str, position: int) -> int:
        place = self._object.place
        end = self._object.scan(text, position)
        if end == position:  # a number is over
            return end
        if end < 0 or not self._read(place or self._object.place, text[position:end]):
            self._give_up()
            return position
        if self._object.is_whole:
            self._held.clear()
            self._literal, self._num_matched = "", 0
            self._state = _State.FRAME
        return end

    def _begin_text(self) -> None:
        self._held.clear()
        self._literal, self._num_matched = self._marker, 0
        self._state = _State.TEXT

    def _begin_frame(self) -> None:
        self._held = [self._marker]
        self._literal, self._num_matched = "", 0
        self._is_marked, self._is_given = True, False
        self._state = _State.FRAME
        if not self._opening:
            self._begin_call()

    def _begin_call(self) -> None:
        self._object = _ObjectScanner()
        self._key, self._name = "", ""
        self._word: list[str] = []  # of the key or the name that is being read
        self._arguments: list[str] = []
        self._is_given = False
        self._literal, self._num_matched = "", 0
        self._state = _State.CALL

    def _give_up(self) -> None:
        """It is no call, or no longer one: what is held is text. If this one's end is missing, the next may have begun."""
        begun = self._literal[: self._num_matched]
        is_marker = self._marker.startswith(begun)
        self._out += self._held if is_marker else [*self._held, begun]
        self._begin_text()
        self._num_matched = len(begun) if is_marker else 0

    def _read(self, place: "_Place | None", piece: str) -> bool:
        """Take over a piece of the call's object. False if it cannot be one of a call."""
        if place is _Place.VALUE and self._key == "arguments":
            return self._read_arguments(piece)
        if place is _Place.KEY or (place is _Place.VALUE and self._key == "name"):
            self._word.append(piece)
            if self._word[0] != '"':
                return False  # the name is no string
            if self._object.place is None and not self._read_word(is_key=place is _Place.KEY):
                return False
        if self._object.is_whole and not self._is_given and not self._read_end():
            return False
        self._held.append(piece)
        return True

    def _read_arguments(self, piece: str) -> bool:
        if not self._arguments and piece != "{":
            return False
        self._arguments.append(piece)
        if self._is_given:
            self._deltas.append(ToolCallDelta(index=len(self._calls) - 1, arguments=piece))
        elif self._name:
            self._give_out()
        else:
            self._held.append(piece)
        return True

    def _read_word(self, *, is_key: bool) -> bool:
        word = json.loads("".join(self._word))
        self._word.clear()
        if is_key:
            self._key = "arguments" if word in _ARGUMENTS_KEYS else word
            is_twice = (self._key == "name" and self._name) or (self._key == "arguments" and self._arguments)
            return not is_twice and (self._is_marked or self._key in _BARE_KEYS)
        if not word or _SURROGATE.search(word):
            return False
        self._name = word
        if self._arguments:
            self._give_out()
        return True

    def _read_end(self) -> bool:
        """The object is whole, but has no arguments: a function that takes none is often called so."""
        if not self._name or not self._is_marked:
            return False
        self._arguments.append("{}")
        self._give_out()
        return True

    def _give_out(self) -> None:
        call_id = "call_" + secrets.token_hex(8)
        arguments = "".join(self._arguments)
        self._deltas.append(ToolCallDelta(index=len(self._calls), id=call_id, name=self._name, arguments=arguments))
        self._calls.append((call_id, self._name, self._arguments))
        self._held.clear()
        self._is_given = True


_ARGUMENTS_KEYS = ("arguments", "parameters")
_BARE_KEYS = ("name", "arguments", "type", "id")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which a JSON escape can write and UTF-8 cannot


# -- JSON in pieces --------------------------------------------------------------------------------------------------------

_WHITE = " \t\n\r"
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_DIGITS, _HEX = "0123456789", "0123456789abcdefABCDEF"

# How a string, a number or a word goes on: state → character → state. A string is over in "end"; the others have no end of
# their own, but may end in the states of _COMPLETE. (RFC 8259, sections 3, 6 and 7.)
_WORDS = ("true", "false", "null")
_POSITIVE = {"0": "0"} | dict.fromkeys("123456789", "1")
_EXPONENT = {"e": "e", "E": "e"}
_LEXEMES: dict[str, dict[str, str]] = {
    "": {'"': "string", "-": "-"} | _POSITIVE | {word[0]: word[0] for word in _WORDS},
    "string": {'"': "end", "\\": "escape"},
    "escape": dict.fromkeys('"\\/bfnrt', "string") | {"u": "hex4"},
    "hex4": dict.fromkeys(_HEX, "hex3"),
    "hex3": dict.fromkeys(_HEX, "hex2"),
    "hex2": dict.fromkeys(_HEX, "hex1"),
    "hex1": dict.fromkeys(_HEX, "string"),
    "-": _POSITIVE,
    "0": {".": "."} | _EXPONENT,
    "1": {".": "."} | _EXPONENT | dict.fromkeys(_DIGITS, "1"),
    ".": dict.fromkeys(_DIGITS, ".1"),
    ".1": dict.fromkeys(_DIGITS, ".1") | _EXPONENT,
    "e": dict.fromkeys("+-", "e+") | dict.fromkeys(_DIGITS, "e1"),
    "e+": dict.fromkeys(_DIGITS, "e1"),
    "e1": dict.fromkeys(_DIGITS, "e1"),
    **{word[:end]: {word[end]: word[: end + 1]} for word in _WORDS for end in range(1, len(word))},
    **{word: {} for word in _WORDS},
}
_COMPLETE = ("0", "1", ".1", "e1", *_WORDS)


class _Place(enum.Enum):
    """Where in the outermost object a character stands, if not between its members."""

    KEY = "key"
    VALUE = "value"


class _Next(enum.Enum):
    """What may come next in JSON, white space aside."""

    FIRST_KEY = "first_key"
    KEY = "key"
    COLON = "colon"
    FIRST_VALUE = "first_value"
    VALUE = "value"
    COMMA = "comma"
    LEXEME = "lexeme"
    NOTHING = "nothing"


_KEYS = (_Next.FIRST_KEY, _Next.KEY)
_VALUES = (_Next.FIRST_VALUE, _Next.VALUE)
_CLOSABLE = (_Next.FIRST_KEY, _Next.FIRST_VALUE, _Next.COMMA)


class _ObjectScanner:
    """Follows one JSON object, with white space before it, through a text that comes in pieces. Keeps no text."""

    def __init__(self) -> None:
        self._next = _Next.VALUE
        self._open: list[str] = []  # the brackets that will close what is open
        self._lexeme = ""
        self._is_key = False

    @property
    def is_whole(self) -> bool:
        return self._next is _Next.NOTHING

    @property
    def place(self) -> _Place | None:
        if len(self._open) > 1:
            return _Place.VALUE
        if self._next is not _Next.LEXEME:
            return None
        return _Place.KEY if self._is_key else _Place.VALUE

    def scan(self, text: str, position: int) -> int:
        """Where the run that begins at ``position`` ends: plain characters of a string, or a single character; it may be
        empty where a number ends. -1 if JSON cannot go on so."""
        character = text[position]
        if self._next is _Next.LEXEME:
            return self._scan_lexeme(text, position)
        if character in _WHITE:
            return position + 1
        return position + 1 if self._step(character) else -1

    def _scan_lexeme(self, text: str, position: int) -> int:
        if self._lexeme == "string":
            run = _PLAIN.match(text, position)
            if run and run.end() > position:
                return run.end()
        following = _LEXEMES[self._lexeme].get(text[position])
        if following is None:
            if self._lexeme not in _COMPLETE:
                return -1
            self._next = _Next.COMMA
            return position
        self._lexeme = following
        if following == "end":
            self._next = _Next.COLON if self._is_key else _Next.COMMA
        return position + 1

    def _step(self, character: str) -> bool:
        """Take over a character outside lexemes. False if it may not stand here."""
        if not self._open and character != "{":
            return False
        if character in "}]":
            if self._next not in _CLOSABLE or self._open.pop() != character:
                return False
            self._next = _Next.COMMA if self._open else _Next.NOTHING
        elif character in "{[":
            if self._next not in _VALUES or len(self._open) == MAX_DEPTH:
                return False
            self._open.append("}" if character == "{" else "]")
            self._next = _Next.FIRST_KEY if character == "{" else _Next.FIRST_VALUE
        elif character == ",":
            if self._next is not _Next.COMMA:
                return False
            self._next = _Next.KEY if self._open[-1] == "}" else _Next.VALUE
        elif character == ":":
            if self._next is not _Next.COLON:
                return False
            self._next = _Next.VALUE
        else:
            self._is_key = self._next in _KEYS
            self._lexeme = _LEXEMES[""].get(character, "")
            if not self._lexeme or not (self._lexeme == "string" if self._is_key else self._next in _VALUES):
                return False
            self._next = _Next.LEXEME
        return True
