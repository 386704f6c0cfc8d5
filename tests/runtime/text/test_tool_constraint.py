"""The grammar that makes a model call tools: what it allows, with llguidance and a real vocabulary."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jsonschema
import numpy
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

import ferrum_rt
from ferrum_rt.interfaces.types import FunctionName, NamedTool, Tool, ToolChoice, ToolFunction
from ferrum_rt.runtime.text.tool_calls import HERMES, LLAMA, MISTRAL, ToolCallParser, ToolFormat, tool_constraint

FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}
DEMO = Path(ferrum_rt.__file__).parent / "demo_model"
every_format = pytest.mark.parametrize("tool_format", FORMATS.values(), ids=FORMATS)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "where": {"$ref": "#/$defs/point"},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["city", "where"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3}},
}
NOTE = {
    "anyOf": [
        {"properties": {"a": {"type": "boolean"}}, "additionalProperties": False},
        {"properties": {"b": {"const": "</tool_call>"}}, "additionalProperties": False},
    ]
}
TOOLS = [
    Tool(function=ToolFunction(name="get_weather", parameters=WEATHER)),
    Tool(function=ToolFunction(name='get "é🙂"', parameters=NOTE)),
    Tool(function=ToolFunction(name="get_time")),
]
SCHEMAS = {tool.function.name: tool.function.parameters or {"maxProperties": 0} for tool in TOOLS}
EVERY_MARKER = [marker for tool_format in FORMATS.values() for marker in tool_format.markers]


class Vocabulary:
    """The demo model's tokenizer, and llguidance's view of it. The markers are special tokens, or tokens that were
    added but are not special (as Qwen's are), or none."""

    def __init__(self, markers: Literal["special", "added", "plain"]) -> None:
        self.rust = RustTokenizer.from_file(str(DEMO / "tokenizer.json"))
        if markers != "plain":
            is_special = markers == "special"
            self.rust.add_tokens([AddedToken(text, special=is_special, normalized=False) for text in EVERY_MARKER])
        self.guide = LLTokenizer(self.rust.to_str())
        self.marker_ids = {
            marker: token_id for marker in EVERY_MARKER if (token_id := self.rust.token_to_id(marker)) is not None
        }
        self.closing = [self.guide.eos_token, *(i for i in range(self.rust.get_vocab_size()) if self.text([i])[:1] in '"}]')]

    def text(self, token_ids: Sequence[int]) -> str:
        return self.rust.decode(list(token_ids), skip_special_tokens=False)

    def constraint(self, tool_format: ToolFormat, choice: ToolChoice, tools: Sequence[Tool] = TOOLS) -> str:
        token_ids = {marker: self.marker_ids[marker] for marker in tool_format.markers if marker in self.marker_ids}
        found = tool_constraint(tool_format, tools, choice, token_ids)
        assert found.type == "grammar"
        assert isinstance(found.definition, str)
        assert LLMatcher.validate_grammar(found.definition, self.guide) == ""
        return found.definition

    def walk(self, definition: str, rng: random.Random) -> list[int]:
        """Tokens chosen at random among those that the grammar allows; after a while rather those that close something."""
        matcher = LLMatcher(self.guide, definition)
        tokens: list[int] = []
        while True:
            mask = numpy.frombuffer(matcher.compute_bitmask(), dtype=numpy.uint8)
            allowed = numpy.flatnonzero(numpy.unpackbits(mask, bitorder="little")).tolist()
            if len(tokens) > 60 or rng.random() < 0.3:
                allowed = [token for token in self.closing if token in set(allowed)] or allowed
            token = rng.choice(allowed)
            if token == self.guide.eos_token:
                assert matcher.is_accepting()
                return tokens
            assert matcher.consume_token(token), matcher.get_error()
            tokens.append(token)

    def allows(self, definition: str, text: str) -> bool:
        """Whether the grammar allows the text as an output, its markers as special tokens where there are such."""
        matcher = LLMatcher(self.guide, definition)
        tokens = self.rust.encode(text, add_special_tokens=False).ids
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.fixture(scope="module", params=["special", "added", "plain"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(request.param)


def named(name: str) -> NamedTool:
    return NamedTool(function=FunctionName(name=name))


@every_format
@pytest.mark.parametrize("choice", ["required", *map(named, SCHEMAS)], ids=["required", *"abc"])
def test_constrained_outputs_are_calls(vocabulary: Vocabulary, tool_format: ToolFormat, choice: ToolChoice) -> None:
    """Whatever a model writes under the constraint is nothing but calls of the functions, with arguments as their schemas
    say; of a named function exactly one. The markers are single tokens where the model has such."""
    definition = vocabulary.constraint(tool_format, choice)
    rng = random.Random(0)
    counts = set()
    for _ in range(12):
        tokens = vocabulary.walk(definition, rng)
        parser = ToolCallParser(tool_format)
        assert (parser.push(vocabulary.text(tokens))[0] + parser.flush()[0]).strip() == ""
        for call in parser.calls:
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, {"type": "object", **SCHEMAS[call.function.name]})
        counts.add(len(parser.calls))
        if isinstance(choice, NamedTool):
            assert [call.function.name for call in parser.calls] == [choice.function.name]
        if vocabulary.marker_ids and not tool_format.is_bare:
            assert tokens[0] == vocabulary.marker_ids[tool_format.marker]
    assert min(counts) > 0
    assert max(counts) > 1 or choice != "required"


def test_constraint_allows_what_models_write(vocabulary: Vocabulary) -> None:
    """Calls as the models' chat templates write them are allowed, with a space after a sign or without; other functions,
    other arguments, text and too many calls are not."""
    first = '{"name": "get_weather", "arguments": {"city": "é", "where": [1, 2]}}'
    second = '{"name": "get_time", "arguments": {}}'
    hermes = vocabulary.constraint(HERMES, "required")
    for source in (first, second, first.replace(": [1, 2]", ":[1,2]")):
        call = f"<tool_call>\n{source}\n</tool_call>"
        assert vocabulary.allows(hermes, call)
        assert vocabulary.allows(hermes, f"{call}\n{call}")
        assert not vocabulary.allows(hermes, f"Well. {call}")
        assert not vocabulary.allows(hermes, f"{call}\nWell.")
    for source in (
        "",
        first.replace("weather", "whether"),
        first.replace("city", "town"),
        first.replace("[1", "[10"),
        first.replace(', "where": [1, 2]', ""),
        second.replace("{}", '{"a": 1}'),
        second.replace("}}", "}"),
        second.replace("{}", "{ }"),
        first.replace(", ", ",  "),
    ):
        assert not vocabulary.allows(hermes, f"<tool_call>\n{source}\n</tool_call>")
    other = '{"name": "get \\"é🙂\\"", "arguments": {"a": true}}'
    assert vocabulary.allows(hermes, f"<tool_call>\n{other}\n</tool_call>")
    llama = vocabulary.constraint(LLAMA, "required")
    assert vocabulary.allows(llama, f"{first}; {second}".replace("arguments", "parameters"))
    mistral = vocabulary.constraint(MISTRAL, "required")
    assert vocabulary.allows(mistral, f"[TOOL_CALLS][{first}, {second}]")
    only = vocabulary.constraint(MISTRAL, named("get_time"))
    assert vocabulary.allows(only, f"[TOOL_CALLS][{second}]")
    assert not vocabulary.allows(only, f"[TOOL_CALLS][{second}, {second}]")
    assert not vocabulary.allows(only, f"[TOOL_CALLS][{first}]")


def test_constraint_is_as_long_as_the_tools() -> None:
    """Each further tool adds the same to the grammar."""
    lengths = []
    for count in (100, 200, 300):
        tools = [Tool(function=ToolFunction(name=f"f{index:03}", parameters=WEATHER)) for index in range(count)]
        constraint = tool_constraint(HERMES, tools, "required", {})
        lengths.append(len(str(constraint.definition)))
    assert lengths[2] - lengths[1] == lengths[1] - lengths[0]
