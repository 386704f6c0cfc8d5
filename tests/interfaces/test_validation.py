"""What is refused at admission: one table for the fields, one for prompts; large and deep values."""

import time
from typing import Any

import pytest

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import (
    ChatMessage,
    FunctionCall,
    FunctionName,
    InferenceRequest,
    Mirostat,
    NamedTool,
    ResponseFormat,
    SamplingParams,
    Tool,
    ToolCall,
    ToolFunction,
)
from ferrum_rt.interfaces.validation import MAX_JSON_DEPTH, MAX_JSON_NODES, REQUEST_CHECKS, SAMPLING_CHECKS, json_tree

# Found in no message: what a prompt says is private.
SECRET = "the launch code is 0000"
CHAT = [ChatMessage(role="user", content=SECRET)]
NAN, INF = float("nan"), float("inf")
WEATHER: dict[str, Any] = {"function": {"name": "weather"}}
JSON_OBJECT = {"type": "json_object"}
LARGE = {"type": "object", "enum": [1] * (MAX_JSON_NODES // 2)}


class Applies:
    def apply(self, token_ids: Any, logits: Any) -> Any:
        return logits


class NotNumber:
    """Its text is as long as that of a large array."""

    def __repr__(self) -> str:
        return "x" * 10**6


def nested(depth: int) -> dict[str, Any]:
    """``depth`` dicts, one in another."""
    tree: dict[str, Any] = {}
    for _ in range(depth - 1):
        tree = {"a": tree}
    return tree


def holding_itself() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["a"] = [tree, tree]
    return tree


def schema(definition: Any) -> dict[str, Any]:
    return {"type": "json_schema", "definition": definition}


def function(**fields: Any) -> list[Any]:
    """The tools: one of them, wrong somewhere."""
    return [{"type": "function", "function": {"name": "f", **fields}}]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    *((f"{name} {kind}", {name: value}, name)
      for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
                   "frequency_penalty", "deadline_s")
      for kind, value in (("nan", NAN), ("inf", INF), ("-inf", -INF), ("bool", True), ("text", "0.5"), ("list", [0.5]))),
    *((f"{name} {kind}", {name: value}, name)
      for name in ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs")
      for kind, value in (("negative", -1), ("float", 1.0), ("nan", NAN), ("bool", True), ("text", "1"), ("2**70", 2**70),
                          ("endless", 10**5000), ("object", NotNumber()))),
    *((f"{name} {kind}", {name: value}, name)
      for name in ("ignore_eos", "skip_special_tokens", "include_stop", "parse_special_tokens")
      for kind, value in (("int", 1), ("text", "yes"), ("none", None))),
    *((f"{name} {kind}", {name: value}, name)
      for name in ("id", "model_id", "client_id", "session_id")
      for kind, value in (("int", 5), ("long", "x" * 257), ("newline", "a\nb"), ("escape", "\x1b[31m"), ("nul", "a\0"),
                          ("surrogate", "\ud800"), ("bytes", b"a"))),
    *((f"{name} empty", {name: ""}, name) for name in ("model_id", "client_id", "session_id")),
    ("client_id none", {"client_id": None}, "client_id"),
    ("id none", {"id": None}, "id"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens"),
    ("max_tokens 2**31", {"max_tokens": 2**31}, "max_tokens"),
    ("min_tokens above max_tokens", {"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ("min_tokens none", {"min_tokens": None}, "min_tokens"),
    ("temperature -0.1", {"temperature": -0.1}, "temperature"),
    ("temperature 101", {"temperature": 101}, "temperature"),
    ("temperature 10**400", {"temperature": 10**400}, "temperature"),
    ("top_p 0", {"top_p": 0}, "top_p"),
    ("top_p 1.01", {"top_p": 1.01}, "top_p"),
    ("top_p negative", {"top_p": -0.1}, "top_p"),
    ("min_p negative", {"min_p": -0.1}, "min_p"),
    ("min_p 1.1", {"min_p": 1.1}, "min_p"),
    ("typical_p 0", {"typical_p": 0.0}, "typical_p"),
    ("typical_p 1.1", {"typical_p": 1.1}, "typical_p"),
    ("typical_p none", {"typical_p": None}, "typical_p"),
    ("repetition_penalty 0", {"repetition_penalty": 0}, "repetition_penalty"),
    ("repetition_penalty negative", {"repetition_penalty": -1.0}, "repetition_penalty"),
    ("repetition_penalty 100.5", {"repetition_penalty": 100.5}, "repetition_penalty"),
    ("presence_penalty 2.1", {"presence_penalty": 2.1}, "presence_penalty"),
    ("frequency_penalty -2.1", {"frequency_penalty": -2.1}, "frequency_penalty"),
    ("seed 2**63", {"seed": 2**63}, "seed"),
    ("n 0", {"n": 0}, "n"),
    ("n 129", {"n": 129}, "n"),
    ("n 10**9", {"n": 10**9}, "n"),
    ("logprobs 21", {"logprobs": 21}, "logprobs"),
    ("prompt_logprobs 21", {"prompt_logprobs": 21}, "prompt_logprobs"),
    ("deadline_s 0", {"deadline_s": 0}, "deadline_s"),
    ("deadline_s negative", {"deadline_s": -1.0}, "deadline_s"),
    ("deadline_s 1e300", {"deadline_s": 1e300}, "deadline_s"),
    ("priority -1", {"priority": -1}, "priority"),
    ("priority 4", {"priority": 4}, "priority"),
    ("priority bool", {"priority": True}, "priority"),
    ("priority name", {"priority": "urgent"}, "priority"),
    ("priority none", {"priority": None}, "priority"),
    ("metadata list", {"metadata": ["a"]}, "metadata"),
    ("metadata int value", {"metadata": {"a": 1}}, "metadata"),
    ("metadata int key", {"metadata": {1: "a"}}, "metadata"),
    ("metadata empty key", {"metadata": {"": "a"}}, "metadata"),
    ("metadata many", {"metadata": {str(i): "" for i in range(65)}}, "metadata"),
    ("metadata long", {"metadata": {"a": "x" * 4097}}, "metadata"),
    ("metadata long key", {"metadata": {"x" * 10**6: "a"}}, "metadata"),
    ("metadata surrogate", {"metadata": {"a": "\ud800"}}, "metadata"),
    ("logit_bias list", {"logit_bias": [1]}, "logit_bias"),
    ("logit_bias word", {"logit_bias": {"hello": 1}}, "logit_bias"),
    ("logit_bias negative id", {"logit_bias": {-1: 1}}, "logit_bias"),
    ("logit_bias negative text id", {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("logit_bias odd digits", {"logit_bias": {"٣": 1}}, "logit_bias"),
    ("logit_bias bool id", {"logit_bias": {True: 1}}, "logit_bias"),
    ("logit_bias float id", {"logit_bias": {1.0: 1}}, "logit_bias"),
    ("logit_bias 2**31", {"logit_bias": {2**31: 1}}, "logit_bias"),
    ("logit_bias twice", {"logit_bias": {5: 1, "5": 2}}, "logit_bias"),
    ("logit_bias nan", {"logit_bias": {5: NAN}}, "logit_bias"),
    ("logit_bias -inf", {"logit_bias": {5: -INF}}, "logit_bias"),
    ("logit_bias 101", {"logit_bias": {5: 101}}, "logit_bias"),
    ("logit_bias bool", {"logit_bias": {5: True}}, "logit_bias"),
    ("logit_bias none", {"logit_bias": {5: None}}, "logit_bias"),
    ("logit_bias many", {"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias"),
    ("stop int", {"stop": 5}, "stop"),
    ("stop none", {"stop": None}, "stop"),
    ("stop set", {"stop": {"a"}}, "stop"),
    ("stop of ints", {"stop": [5]}, "stop"),
    ("stop empty", {"stop": ""}, "stop"),
    ("stop of empty", {"stop": ["a", ""]}, "stop"),
    ("stop long", {"stop": ["x" * 1025]}, "stop"),
    ("stop many", {"stop": ["x"] * 65}, "stop"),
    ("stop surrogate", {"stop": "\udfff"}, "stop"),
    ("stop_token_ids int", {"stop_token_ids": 5}, "stop_token_ids"),
    ("stop_token_ids words", {"stop_token_ids": ["a"]}, "stop_token_ids"),
    ("stop_token_ids bool", {"stop_token_ids": [1, True]}, "stop_token_ids"),
    ("stop_token_ids negative", {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("stop_token_ids 2**31", {"stop_token_ids": [2**31]}, "stop_token_ids"),
    ("stop_token_ids many", {"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ("allowed_token_ids empty", {"allowed_token_ids": []}, "allowed_token_ids"),
    ("allowed_token_ids text", {"allowed_token_ids": "123"}, "allowed_token_ids"),
    ("allowed_token_ids bool", {"allowed_token_ids": [False]}, "allowed_token_ids"),
    ("allowed_token_ids float", {"allowed_token_ids": [1, 1.0]}, "allowed_token_ids"),
    ("allowed_token_ids negative", {"allowed_token_ids": [5, -1]}, "allowed_token_ids"),
    ("allowed_token_ids many", {"allowed_token_ids": range(2**20 + 1)}, "allowed_token_ids"),
    ("bad_words text", {"bad_words": "no"}, "bad_words"),
    ("bad_words empty", {"bad_words": [""]}, "bad_words"),
    ("bad_words ints", {"bad_words": [1]}, "bad_words"),
    ("bad_words long", {"bad_words": ["x" * 1025]}, "bad_words"),
    ("bad_words many", {"bad_words": ["x"] * 65}, "bad_words"),
    ("bad_words surrogate", {"bad_words": ["a\ud800"]}, "bad_words"),
    ("response_format text", {"response_format": "json"}, "response_format"),
    ("response_format list", {"response_format": [JSON_OBJECT]}, "response_format"),
    ("response_format type", {"response_format": {"type": "yaml"}}, "response_format"),
    ("response_format type int", {"response_format": ResponseFormat(type=5)}, "response_format"),  # type: ignore[arg-type]
    ("response_format type list", {"response_format": {"type": []}}, "response_format"),
    ("response_format unknown field", {"response_format": {"type": "text", "strict": True}}, "response_format"),
    ("response_format two", {"response_format": schema({}) | {"json_schema": {"schema": {}}}}, "response_format"),
    ("response_format no schema", {"response_format": {"type": "json_schema"}}, "response_format"),
    ("response_format no inner schema", {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ("response_format list schema", {"response_format": schema([])}, "response_format"),
    ("response_format empty schema", {"response_format": schema("")}, "response_format"),
    ("response_format long schema", {"response_format": schema("x" * (2**18 + 1))}, "response_format"),
    ("response_format nan in schema", {"response_format": schema({"minimum": NAN})}, "response_format"),
    ("response_format object in schema", {"response_format": schema({"enum": [NotNumber()]})}, "response_format"),
    ("response_format 2**64 in schema", {"response_format": schema({"maximum": 2**64})}, "response_format"),
    ("response_format int key", {"response_format": schema({"a": {1: 2}})}, "response_format"),
    ("response_format surrogate", {"response_format": schema({"\ud800": 1})}, "response_format"),
    ("response_format deep", {"response_format": schema(nested(MAX_JSON_DEPTH + 1))}, "response_format"),
    ("response_format in itself", {"response_format": schema(holding_itself())}, "response_format"),
    ("response_format wide", {"response_format": schema({"enum": [1] * MAX_JSON_NODES})}, "response_format"),
    ("response_format much text", {"response_format": schema({"enum": ["x" * 2**17] * 3})}, "response_format"),
    ("response_format regex dict", {"response_format": {"type": "regex", "definition": {}}}, "response_format"),
    ("response_format no regex", {"response_format": {"type": "regex"}}, "response_format"),
    ("response_format grammar dict", {"response_format": {"type": "grammar", "definition": {}}}, "response_format"),
    ("response_format text definition", {"response_format": {"definition": "a"}}, "response_format"),
    ("response_format object definition", {"response_format": JSON_OBJECT | {"definition": {}}}, "response_format"),
    ("ignore_eos with response_format", {"ignore_eos": True, "response_format": JSON_OBJECT}, "ignore_eos"),
    ("min_tokens with response_format", {"min_tokens": 1, "response_format": JSON_OBJECT}, "min_tokens"),
    ("mirostat int", {"mirostat": 2}, "mirostat"),
    ("mirostat tau 0", {"mirostat": Mirostat(tau=0)}, "mirostat"),
    ("mirostat tau nan", {"mirostat": {"tau": NAN}}, "mirostat"),
    ("mirostat eta negative", {"mirostat": {"eta": -0.1}}, "mirostat"),
    ("mirostat eta none", {"mirostat": {"eta": None}}, "mirostat"),
    ("mirostat text", {"mirostat": Mirostat(tau="5")}, "mirostat"),  # type: ignore[arg-type]
    ("mirostat unknown field", {"mirostat": {"mode": 2}}, "mirostat"),
    ("mirostat greedy", {"mirostat": {}, "temperature": 0}, "mirostat"),
    ("mirostat with top_k", {"mirostat": {}, "top_k": 5}, "mirostat"),
    ("mirostat with top_p", {"mirostat": {}, "top_p": 0.9}, "mirostat"),
    ("mirostat with min_p", {"mirostat": {}, "min_p": 0.1}, "mirostat"),
    ("mirostat with typical_p", {"mirostat": {}, "typical_p": 0.5}, "mirostat"),
    ("tools dict", {"tools": WEATHER}, "tools"),
    ("tools of text", {"tools": ["weather"]}, "tools"),
    ("tools none", {"tools": None}, "tools"),
    ("tools type", {"tools": [WEATHER | {"type": "retrieval"}]}, "tools"),
    ("tools no function", {"tools": [{"type": "function"}]}, "tools"),
    ("tools unknown field", {"tools": [{"name": "f", "parameters": {"type": "object"}}]}, "tools"),
    ("tools unknown key", {"tools": [WEATHER | {"a b": 1}]}, "tools"),
    ("tools no name", {"tools": [{"function": {"description": "x"}}]}, "tools"),
    ("tools name empty", {"tools": function(name="")}, "tools"),
    ("tools name long", {"tools": function(name="x" * 65)}, "tools"),
    ("tools name space", {"tools": function(name="a b")}, "tools"),
    ("tools name newline", {"tools": function(name="a\n")}, "tools"),
    ("tools name letter", {"tools": function(name="wéather")}, "tools"),
    ("tools name int", {"tools": [Tool(function=ToolFunction(name=5))]}, "tools"),  # type: ignore[arg-type]
    ("tools twice", {"tools": [WEATHER, WEATHER]}, "tools"),
    ("tools many", {"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    ("tools description", {"tools": function(description=5)}, "tools"),
    ("tools long description", {"tools": function(description="x" * (2**16 + 1))}, "tools"),
    ("tools parameters list", {"tools": function(parameters=[])}, "tools"),
    ("tools parameters no object", {"tools": function(parameters={"type": "array"})}, "tools"),
    ("tools parameters bare", {"tools": function(parameters={"city": "string"})}, "tools"),
    ("tools parameters deep", {"tools": function(parameters={"type": "object", "a": nested(64)})}, "tools"),
    ("tools parameters nan", {"tools": function(parameters={"type": "object", "a": NAN})}, "tools"),
    ("tools parameters together", {"tools": [*function(name="a", parameters=LARGE), *function(name="b", parameters=LARGE)]},
     "tools"),
    ("tool_choice name", {"tools": [WEATHER], "tool_choice": "weather"}, "tool_choice"),
    ("tool_choice none", {"tools": [WEATHER], "tool_choice": None}, "tool_choice"),
    ("tool_choice empty", {"tools": [WEATHER], "tool_choice": {}}, "tool_choice"),
    ("tool_choice type", {"tools": [WEATHER], "tool_choice": WEATHER | {"type": "tool"}}, "tool_choice"),
    ("tool_choice other", {"tools": [WEATHER], "tool_choice": {"function": {"name": "rain"}}}, "tool_choice"),
    ("tool_choice int", {"tool_choice": NamedTool(function=FunctionName(name=5))}, "tool_choice"),  # type: ignore[arg-type]
    ("tool_choice without tools", {"tool_choice": "required"}, "tool_choice"),
    ("tool_choice named without tools", {"tool_choice": WEATHER}, "tool_choice"),
    ("tool_choice and format", {"tools": [WEATHER], "tool_choice": WEATHER, "response_format": JSON_OBJECT}, "tool_choice"),
    ("tool_choice and ignore_eos", {"tools": [WEATHER], "tool_choice": WEATHER, "ignore_eos": True}, "tool_choice"),
    ("tool_choice and min_tokens", {"tools": [WEATHER], "tool_choice": WEATHER, "min_tokens": 1}, "tool_choice"),
    ("logits_processors one", {"logits_processors": Applies()}, "logits_processors"),
    ("logits_processors function", {"logits_processors": [abs]}, "logits_processors"),
    ("logits_processors class", {"logits_processors": [Applies]}, "logits_processors"),
    ("logits_processors none", {"logits_processors": [None]}, "logits_processors"),
    ("logits_processors many", {"logits_processors": [Applies()] * 17}, "logits_processors"),
    ("sampling_params none", {"sampling_params": None}, "sampling_params"),
    ("sampling_params list", {"sampling_params": [("max_tokens", 5)]}, "sampling_params"),
    ("sampling_params unknown", {"sampling_params": {"max_token": 5}}, "sampling_params"),
    ("sampling_params many", {"sampling_params": dict.fromkeys(range(10**5))}, "sampling_params"),
    ("sampling_params inside", {"sampling_params": {"max_tokens": "5"}}, "max_tokens"),
    ("sampling_params inside struct", {"sampling_params": SamplingParams(seed=object())}, "seed"),  # type: ignore[arg-type]
]  # fmt: skip
BY_ID = {case: (fields, name) for case, fields, name in WRONG}


def refusal(prompt: Any, fields: dict[str, Any]) -> str:
    """The message with which a request is refused."""
    with pytest.raises(RequestValidationError) as caught:
        build_request(prompt, fields)
    return str(caught.value)


def starts_with_field(message: str, name: str) -> bool:
    return message.startswith(name) and message[len(name)] in ":.[,"


@pytest.mark.parametrize("case", BY_ID)
def test_wrong_fields(case: str) -> None:
    """What is wrong is refused with a short message that begins with the field's name and quotes no prompt; flat, and inside
    an InferenceRequest, whose constructor checks nothing."""
    fields, name = BY_ID[case]
    message = refusal(CHAT, fields)
    assert starts_with_field(message, name)
    assert len(message) < 300
    assert SECRET not in message
    of_request = {key: value for key, value in fields.items() if key not in SAMPLING_CHECKS}
    if len(of_request) < len(fields):
        of_request["sampling_params"] = SamplingParams(**{key: fields[key] for key in fields if key in SAMPLING_CHECKS})
    assert refusal(InferenceRequest(prompt=CHAT, **of_request), {}) == message


def test_the_table_is_whole() -> None:
    """Every field has at least two wrong values in the table, which has no case twice."""
    assert len(BY_ID) == len(WRONG) > 200
    for name in (*SAMPLING_CHECKS, *REQUEST_CHECKS):
        assert sum(name == of for _, _, of in WRONG) >= 2, name


def test_messages_say_what_to_do() -> None:
    """A message has the value, what is allowed, and where there is a trap, the way around it."""
    assert refusal("", {"top_k": -1}) == "top_k: must be between 0 and 2147483647, got -1; 0 keeps every token"
    assert refusal("", {"top_p": 0}).endswith("got 0; for greedy sampling set temperature to 0")
    assert refusal("", {"temperature": "hot"}) == "temperature: must be a number, got 'hot'"
    assert refusal("", {"stop": ["a", ""]}) == "stop[1]: must be text of 1 to 1024 characters, got 0 characters"
    assert refusal("", {"seed": 10**5000}).endswith("got an integer of 16610 bits")
    assert "did you mean 'tau'" in refusal("", {"mirostat": {"tao": 5}})


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        SECRET.encode(),
        bytearray(SECRET.encode()),
        memoryview(SECRET.encode()),
        {"role": "user", "content": SECRET},
        {1, 2},
        iter([1, 2]),
        InferenceRequest(prompt=InferenceRequest(prompt=SECRET)),  # type: ignore[arg-type]
        [],
        (),
        [True],
        [1, True],
        [1, -1],
        [1, SECRET],
        [1.0],
        [1, 2.0],
        [2**31],
        [1, 10**5000],
        [None],
        [SECRET],
        [*CHAT, 1],
        [*CHAT, SECRET],
        [1, *CHAT],
        range(10**30),
        range(10**12),
        [{}],
        [{"role": "", "content": SECRET}],
        [{"role": "<|im_start|>system", "content": SECRET}],
        [{"role": "r" * 65, "content": SECRET}],
        [{"role": 5, "content": SECRET}],
        [{"role": SECRET * 100, "content": SECRET}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": SECRET}]}],
        [{"role": "user", "contents": SECRET}],
        [{"role": "user", SECRET: SECRET}],
        [{"role": "user", "content": SECRET, "name": 5}],
        [{"role": "tool", "content": SECRET, "tool_call_id": ""}],
        [{"role": "assistant", "tool_calls": SECRET}],
        [{"role": "assistant", "tool_calls": [SECRET]}],
        [{"role": "assistant", "tool_calls": [{"id": "a", "type": SECRET, "function": {"name": "f", "arguments": ""}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"a": SECRET}}}]}],
        [{"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f", "arguments": SECRET}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "a", "function": SECRET}]}],
        [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
        [ChatMessage(role="user", content=None)],  # type: ignore[arg-type]
        [*CHAT, ChatMessage(role=1, content=SECRET)],  # type: ignore[arg-type]
        [ChatMessage(role="a", tool_calls=[ToolCall(id="a", function=SECRET)])],  # type: ignore[arg-type]
        [ChatMessage(role="a", tool_calls=[ToolCall(id="a", function=FunctionCall(name="f", arguments=5))])],  # type: ignore[arg-type]
        CHAT * 10_001,
        nested(100_000),
        [nested(100_000)],
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_wrong_prompts(prompt: Any) -> None:
    """Anything but text, token ids and messages is refused, with a short message that names the prompt and quotes none."""
    message = refusal(prompt, {})
    assert starts_with_field(message, "prompt")
    assert len(message) < 300
    assert SECRET not in message


@pytest.mark.parametrize("prompt", [SECRET, [1, 2]], ids=["text", "ids"])
def test_tools_need_messages(prompt: Any) -> None:
    """Only a chat template can tell a model of tools: with text or token ids they are refused."""
    assert refusal(prompt, {"tools": [WEATHER]}).startswith("tools: they need chat messages")


def seconds(prompt: Any, fields: dict[str, Any], *, refused: bool) -> float:
    """The best of three: how long it takes to build the request or to refuse it."""
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        try:
            build_request(prompt, fields)
            was_refused = False
        except RequestValidationError:
            was_refused = True
        best = min(best, time.perf_counter() - start)
        assert was_refused is refused
    return best


@pytest.mark.parametrize("field", ["stop", "bad_words", "tools", "logits_processors", "stop_token_ids"])
def test_a_million_of_anything_is_refused_at_once(field: str) -> None:
    """The length is looked at before what is in a list."""
    assert seconds("", {field: ["x"] * 10**6}, refused=True) < 0.01


def test_a_million_biases_are_refused_at_once() -> None:
    """So it is with dicts, and with the text of a definition."""
    million = dict.fromkeys(range(10**6), 1.0)
    assert seconds("", {"logit_bias": million}, refused=True) < 0.01
    assert seconds("", {"metadata": million}, refused=True) < 0.01
    assert seconds("", {"mirostat": million}, refused=True) < 0.01
    assert seconds("", {"response_format": schema(million)}, refused=True) < 0.01
    assert seconds("", {"response_format": schema({"enum": [0] * 10**6})}, refused=True) < 0.01
    assert seconds("", {"response_format": schema("x" * 10**7)}, refused=True) < 0.01


@pytest.mark.slow
def test_a_million_token_ids_are_checked_quickly() -> None:
    """A prompt as long as the longest contexts holds the event loop for a moment, and for as long when it is wrong."""
    ids = list(range(10**6))
    assert seconds(ids, {}, refused=False) < 0.25
    ids[-1] = -1
    assert seconds(ids, {}, refused=True) < 0.5


@pytest.mark.parametrize(
    "name", ["response_format", "tools", "metadata", "logit_bias", "sampling_params", "mirostat", "stop"]
)
def test_no_depth_overflows_the_stack(name: str) -> None:
    """A hundred thousand dicts, one in another, are refused at once wherever they stand, not by RecursionError."""
    deep = nested(100_000)
    value: Any = {"response_format": schema(deep), "tools": function(parameters={"type": "object", "a": deep})}.get(
        name, deep
    )
    assert seconds(CHAT, {name: value}, refused=True) < 0.01


def test_the_bounds_of_a_tree() -> None:
    """Depth and number of nodes may reach their bounds; the rest of the budget comes back, so that several can share it."""
    assert json_tree("x", nested(MAX_JSON_DEPTH)) == MAX_JSON_NODES - MAX_JSON_DEPTH + 1
    assert json_tree("x", [None, True, 2**64 - 1, -(2**63), 0.5, "é", (1,), {"a": []}], budget=10) == 0
    with pytest.raises(RequestValidationError, match=r"^x: too large"):
        json_tree("x", [[1, 2], [3]], budget=4)


@pytest.mark.slow
def test_a_usual_request_is_quick() -> None:
    """The event loop pays for every request: a usual one takes some microseconds."""
    fields = {"max_tokens": 64, "temperature": 0.7, "top_p": 0.9}
    start = time.perf_counter()
    for _ in range(2000):
        build_request("hello", fields)
    assert time.perf_counter() - start < 2000 * 100e-6
