"""From what a caller wrote to a checked InferenceRequest: how it is put together. What is refused: test_validation.py."""

from collections.abc import Mapping
from typing import Any, TypedDict, get_type_hints

import msgspec
import pytest

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.requests import RequestFields, build_request, check_sampling, check_vocabulary, is_token_ids
from ferrum_rt.interfaces.types import (
    ChatMessage,
    ClientId,
    FunctionCall,
    FunctionName,
    InferenceRequest,
    Mirostat,
    NamedTool,
    Priority,
    Prompt,
    RequestId,
    ResponseFormat,
    SamplingParams,
    SessionId,
    Tool,
    ToolCall,
    ToolFunction,
)
from ferrum_rt.interfaces.validation import REQUEST_CHECKS, SAMPLING_CHECKS

MESSAGE = ChatMessage(role="user", content="hello")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = Tool(function=ToolFunction(name="weather", description="of a city", parameters=SCHEMA))
WEATHER_DICT = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}
# Fields that may be written in more ways than the Struct holds.
WIDER = {
    "sampling_params",
    "priority",
    "metadata",
    "tools",
    "tool_choice",
    "logits_processors",
    "logit_bias",
    "stop",
    "response_format",
    "mirostat",
}


class OtherMessage(TypedDict):
    """As other libraries type their messages."""

    role: str
    content: str


class Doubler:
    def apply(self, token_ids: Any, logits: Any) -> Any:
        return logits * 2


PROCESSOR = Doubler()


def test_request_fields_are_those_of_the_structs() -> None:
    """The typed keywords are the fields of InferenceRequest (but the prompt) and of SamplingParams, with their types."""
    expected = get_type_hints(InferenceRequest) | get_type_hints(SamplingParams)
    del expected["prompt"]
    found = get_type_hints(RequestFields)
    assert set(found) == set(expected)
    assert {name for name in found if found[name] != expected[name]} == WIDER


def test_every_field_has_a_check() -> None:
    """A field without a check could hold anything; the tables name each field of their Struct once."""
    assert set(SAMPLING_CHECKS) == set(SamplingParams.__struct_fields__)
    assert set(REQUEST_CHECKS) == set(InferenceRequest.__struct_fields__) - {"prompt", "sampling_params"}


def test_structs_share_no_field() -> None:
    """A flat field belongs to one of the two Structs, never both."""
    assert not set(InferenceRequest.__struct_fields__) & set(SamplingParams.__struct_fields__)


def test_flat_fields() -> None:
    """Each field lands in the Struct that has it."""
    request = build_request(
        "hello", {"id": "a", "priority": Priority.HIGH, "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "seed": 7}
    )
    assert request == InferenceRequest(
        prompt="hello",
        id=RequestId("a"),
        priority=Priority.HIGH,
        sampling_params=SamplingParams(max_tokens=5, temperature=0.5, stop=["x"], seed=7),
    )


def test_fields_are_laid_over_a_request() -> None:
    """A field given beside a request replaces the request's own, and the request is not changed."""
    given = InferenceRequest(
        prompt="hello",
        id=RequestId("a"),
        client_id=ClientId("me"),
        sampling_params=SamplingParams(max_tokens=5, top_k=3, seed=1),
    )
    request = build_request(given, {"max_tokens": 9, "deadline_s": 2})
    assert request.sampling_params == SamplingParams(max_tokens=9, top_k=3, seed=1)
    assert (request.id, request.client_id, request.deadline_s) == ("a", "me", 2.0)
    assert given.sampling_params.max_tokens == 5


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=5, top_k=3, seed=1), {"max_tokens": 5, "top_k": 3, "seed": 1}])
def test_sampling_params_and_flat_fields_together(params: Any) -> None:
    """A flat field is laid over sampling_params that are given beside it, whichever comes first; both over a request's."""
    expected = SamplingParams(max_tokens=5, top_k=1, seed=1)
    given = InferenceRequest(prompt="hello", sampling_params=SamplingParams(max_tokens=7, min_p=0.5))
    for fields in ({"sampling_params": params, "top_k": 1}, {"top_k": 1, "sampling_params": params}):
        assert build_request("hello", fields).sampling_params == expected
        assert build_request(given, fields).sampling_params == expected


def test_a_request_without_an_id_gets_one() -> None:
    """The engine chooses an id where none is given, and never the same one twice."""
    ids = {build_request("hello", {}).id for _ in range(100)}
    assert len(ids) == 100
    assert "" not in ids
    assert build_request("hello", {"id": ""}).id != ""


def test_a_request_without_a_seed_gets_one() -> None:
    """A fresh seed in its range is chosen where none is given, so that the response can say it; one that is given stays."""
    seeds = [build_request("hello", {"seed": None}).sampling_params.seed for _ in range(100)]
    assert len(set(seeds)) == 100
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert build_request("hello", {"sampling_params": SamplingParams(seed=0)}).sampling_params.seed == 0


def test_a_built_request_is_built_again_unchanged() -> None:
    """What build_request returns, it takes, and changes nothing: neither the id nor the seed."""
    request = build_request([MESSAGE], {"tools": [WEATHER], "stop": "x", "logit_bias": {"5": 1}, "mirostat": {"tau": 3}})
    assert build_request(request, {}) == request


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", "hello"),
        ("", ""),
        ("\ud800", "\ud800"),
        ([1, 2, 3], [1, 2, 3]),
        ((1, 2, 3), [1, 2, 3]),
        (range(3), [0, 1, 2]),
        ([2**31 - 1], [2**31 - 1]),
        ([MESSAGE], [MESSAGE]),
        ((MESSAGE, MESSAGE), [MESSAGE, MESSAGE]),
        ([{"role": "user", "content": "hello"}], [MESSAGE]),
        ([MESSAGE, {"role": "user", "content": "hello", "refusal": None, "annotations": []}], [MESSAGE, MESSAGE]),
        ([{"role": "user"}], [ChatMessage(role="user")]),
        ([{"role": "tool", "content": "5", "name": None, "tool_calls": None}], [ChatMessage(role="tool", content="5")]),
    ],
    ids=repr,
)
def test_prompts(prompt: Any, expected: Any) -> None:
    """Text, token ids and chat messages are prompts, in any kind of sequence; they come out as str or a new list."""
    built = build_request(prompt, {}).prompt
    assert built == expected
    assert type(built) is type(expected)
    assert isinstance(prompt, str) or built is not prompt


def test_tool_calls_in_a_prompt() -> None:
    """An assistant's calls and a tool's answer may be dicts too; beside calls the content may be None."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    prompt: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"},
    ]
    expected = [
        ChatMessage(role="assistant", tool_calls=[ToolCall(id="c1", function=FunctionCall(name="weather", arguments="{}"))]),
        ChatMessage(role="tool", content="rain", tool_call_id="c1", name="weather"),
    ]
    assert build_request(prompt, {}).prompt == expected
    assert build_request(expected, {}).prompt == expected


def test_prompt_types() -> None:
    """What callers have at hand passes mypy as a Prompt, without a cast."""
    ids: list[int] = [1]
    messages: list[ChatMessage] = [MESSAGE]
    strings: list[dict[str, str]] = [{"role": "user", "content": "hello"}]
    anything: list[dict[str, Any]] = [{"role": "user", "content": "hello", "tool_calls": []}]
    mappings: tuple[Mapping[str, object], ...] = tuple(strings)
    typed: list[OtherMessage] = [OtherMessage(role="user", content="hello")]
    prompts: list[Prompt] = ["hello", ids, (1, 2), range(3), messages, strings, anything, mappings, typed]
    for prompt in prompts:
        assert build_request(prompt, {}).prompt


def test_fields_types() -> None:
    """What callers have at hand passes mypy as fields, without a cast."""
    tools: list[dict[str, Any]] = [WEATHER_DICT]
    bias: dict[int, int] = {5: 1}
    fields = RequestFields(
        tools=tools, logit_bias=bias, stop="\n", priority="high", response_format={"type": "text"}, mirostat={"tau": 5.0}
    )
    assert build_request([MESSAGE], fields).priority is Priority.HIGH


def test_token_ids_are_told_from_messages() -> None:
    """A list of ids is a prompt of token ids; text and messages are not."""
    assert is_token_ids([1, 2])
    assert not is_token_ids("12")
    assert not is_token_ids([MESSAGE])


@pytest.mark.parametrize(
    ("field", "nearest"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stop_strings", "stop"), ("clientid", "client_id")],
)
def test_unknown_field(field: str, nearest: str) -> None:
    """An unknown field is a TypeError, as for any function, that names the nearest one."""
    with pytest.raises(TypeError, match=f"unknown request field '{field}'; did you mean '{nearest}'?"):
        build_request("hello", {field: 1})


def test_unknown_field_of_any_length() -> None:
    """A name of a million characters costs no search and no long message; one that is no string is a TypeError too."""
    with pytest.raises(TypeError, match="unknown request field") as caught:
        build_request("hello", {"x" * 10**6: 1})
    assert len(str(caught.value)) < 300
    with pytest.raises(TypeError, match="unknown request field 5"):
        build_request("hello", {5: 1})  # type: ignore[dict-item]


def test_prompt_is_no_field() -> None:
    """The prompt cannot be given a second time as a field, and the message does not suggest it."""
    for given in ("hello", InferenceRequest(prompt="hello")):
        with pytest.raises(TypeError, match="prompt") as caught:
            build_request(given, {"prompt": "bye"})
        assert "did you mean 'prompt'" not in str(caught.value)


GOOD: list[tuple[str, Any, Any]] = [
    ("id", "a" * 256, "a" * 256),
    ("model_id", None, None),
    ("model_id", "org/model", "org/model"),
    ("priority", 3, Priority.CRITICAL),
    ("priority", "low", Priority.LOW),
    ("priority", Priority.LOW, Priority.LOW),
    ("client_id", "Ünïcode 客户", "Ünïcode 客户"),
    ("session_id", None, None),
    ("session_id", SessionId("s"), "s"),
    ("deadline_s", 1, 1.0),
    ("deadline_s", None, None),
    ("deadline_s", 1e-3, 1e-3),
    ("metadata", {}, {}),
    ("metadata", {"a": ""}, {"a": ""}),
    ("metadata", {str(i): "x" * 4096 for i in range(64)}, {str(i): "x" * 4096 for i in range(64)}),
    ("tools", [WEATHER], [WEATHER]),
    ("tools", (WEATHER_DICT,), [WEATHER]),
    ("tools", [{"function": {"name": "f.g-h_9", "strict": True}}], [Tool(function=ToolFunction(name="f.g-h_9"))]),
    ("tools", [], []),
    ("tool_choice", "none", "none"),
    ("parse_special_tokens", True, True),
    ("logits_processors", (PROCESSOR,), [PROCESSOR]),
    ("logits_processors", [PROCESSOR] * 16, [PROCESSOR] * 16),
    ("max_tokens", 1, 1),
    ("max_tokens", None, None),
    ("max_tokens", 2**31 - 1, 2**31 - 1),
    ("min_tokens", 0, 0),
    ("temperature", 0, 0.0),
    ("temperature", 1e-300, 1e-300),
    ("temperature", 100, 100.0),
    ("temperature", None, None),
    ("top_p", 1, 1.0),
    ("top_p", 1e-9, 1e-9),
    ("top_k", 0, 0),
    ("top_k", 2**31 - 1, 2**31 - 1),
    ("min_p", 0, 0.0),
    ("min_p", 1.0, 1.0),
    ("typical_p", 1, 1.0),
    ("typical_p", 0.2, 0.2),
    ("repetition_penalty", 0.5, 0.5),
    ("repetition_penalty", 100, 100.0),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 2, 2.0),
    ("logit_bias", {}, {}),
    ("logit_bias", {"123": -100, 5: 100}, {123: -100.0, 5: 100.0}),
    ("logit_bias", dict.fromkeys(range(1024), 1), dict.fromkeys(range(1024), 1.0)),
    ("logit_bias", {2**31 - 1: 0}, {2**31 - 1: 0.0}),
    ("stop", "\n", ["\n"]),
    ("stop", [], []),
    ("stop", ("a", "b"), ["a", "b"]),
    ("stop", ["x" * 1024] * 64, ["x" * 1024] * 64),
    ("stop_token_ids", (0, 2**31 - 1), [0, 2**31 - 1]),
    ("stop_token_ids", list(range(1024)), list(range(1024))),
    ("ignore_eos", True, True),
    ("seed", 0, 0),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("n", 128, 128),
    ("logprobs", 0, 0),
    ("logprobs", 20, 20),
    ("prompt_logprobs", 0, 0),
    ("prompt_logprobs", 20, 20),
    ("allowed_token_ids", [5], [5]),
    ("allowed_token_ids", (5, 5), [5, 5]),
    ("bad_words", None, None),
    ("bad_words", ["x"] * 64, ["x"] * 64),
    ("skip_special_tokens", False, False),
    ("include_stop", True, True),
    ("response_format", None, None),
    ("response_format", {"type": "json_object"}, ResponseFormat(type="json_object")),
    ("response_format", {}, ResponseFormat()),
    ("response_format", ResponseFormat(type="regex", definition="a+"), ResponseFormat(type="regex", definition="a+")),
    ("response_format", {"type": "grammar", "definition": "g"}, ResponseFormat(type="grammar", definition="g")),
    ("response_format", {"type": "json_schema", "definition": {}}, ResponseFormat(type="json_schema", definition={})),
    ("response_format", {"type": "json_schema", "definition": "{}"}, ResponseFormat(type="json_schema", definition="{}")),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}},
        ResponseFormat(type="json_schema", definition=SCHEMA),
    ),
    ("mirostat", Mirostat(), Mirostat()),
    ("mirostat", {"tau": 3}, Mirostat(tau=3.0)),
]


def name_of(value: Any) -> str:
    """A short name for a parametrized test."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 30 else f"{value!r}"[:40]


@pytest.mark.parametrize(("field", "value", "expected"), GOOD, ids=name_of)
def test_good_fields(field: str, value: Any, expected: Any) -> None:
    """The ends of each range are part of it, None is good where it means the default, and what may be written in several
    ways comes out in one, of the Struct's own type."""
    prompt = [MESSAGE] if field == "tools" else "hello"
    request = build_request(prompt, {field: value})
    found = getattr(request if field in REQUEST_CHECKS else request.sampling_params, field)
    assert found == expected
    assert type(found) is type(expected)


def test_every_field_is_good_somewhere() -> None:
    """No field is left out of the table."""
    assert {field for field, _, _ in GOOD} == {*SAMPLING_CHECKS, *REQUEST_CHECKS}


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 5, "max_tokens": 5},
        {"ignore_eos": True, "response_format": {"type": "text"}},
        {"mirostat": {}, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "temperature": 0.1},
        {"n": 4, "temperature": 0},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tools": [WEATHER], "tool_choice": NamedTool(function=FunctionName(name="weather"))},
        {"tools": [WEATHER], "tool_choice": "auto", "response_format": {"type": "json_object"}},
        {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "text"}},
    ],
    ids=name_of,
)
def test_fields_that_go_together(fields: dict[str, Any]) -> None:
    """Pairs that come near a conflict are none."""
    assert build_request([MESSAGE], fields).id


def test_check_sampling() -> None:
    """Parameters on their own, such as a model's defaults, are held to the same ranges, and to each other."""
    check_sampling(SamplingParams(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05))
    with pytest.raises(RequestValidationError, match=r"^repetition_penalty: must be above 0"):
        check_sampling(SamplingParams(repetition_penalty=0.0))
    with pytest.raises(RequestValidationError, match=r"^mirostat: "):
        check_sampling(SamplingParams(mirostat=Mirostat(), top_k=5))


def test_check_vocabulary() -> None:
    """A token that the model lacks is refused by the name of the field that has it; the last one that it has is good."""
    good: dict[str, Any] = {"logit_bias": {99: 1.0}, "allowed_token_ids": [0, 99], "stop_token_ids": [99, 3]}
    check_vocabulary(SamplingParams(), 100)
    check_vocabulary(SamplingParams(**good), 100)
    for name, value in good.items():
        with pytest.raises(RequestValidationError, match=f"^{name}: no token 99; the model's tokens are 0 to 98$"):
            check_vocabulary(SamplingParams(**{name: value}), 99)


def test_requests_survive_a_round_trip() -> None:
    """A request that was built is equal to itself after a trip through msgpack."""
    fields = {"max_tokens": 5, "metadata": {"a": "b"}, "logit_bias": {5: 1}, "response_format": {"type": "json_object"}}
    chat = {"tools": [WEATHER_DICT], "tool_choice": {"function": {"name": "weather"}}}
    for request in (build_request("hello", fields), build_request([1, 2], fields), build_request([MESSAGE], chat)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=InferenceRequest) == request
