"""From what a caller wrote to a checked InferenceRequest."""

from typing import Any, get_type_hints

import msgspec
import pytest

from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.requests import (
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    RequestFields,
    build_request,
    is_token_ids,
)
from ferrum_rt.interfaces.types import (
    ChatMessage,
    ClientId,
    InferenceRequest,
    Mirostat,
    Priority,
    RequestId,
    ResponseFormat,
    SamplingParams,
)

MESSAGE = ChatMessage(role="user", content="hello")
NAN = float("nan")


def test_request_fields_are_those_of_the_structs() -> None:
    """The typed keywords are the fields of InferenceRequest (but the prompt) and of SamplingParams, with their types."""
    expected = get_type_hints(InferenceRequest) | get_type_hints(SamplingParams)
    del expected["prompt"]
    assert get_type_hints(RequestFields) == expected


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
        sampling_params=SamplingParams(max_tokens=5, top_k=3),
    )
    request = build_request(given, {"max_tokens": 9, "deadline_s": 2})
    assert request.sampling_params == SamplingParams(max_tokens=9, top_k=3)
    assert (request.id, request.client_id, request.deadline_s) == ("a", "me", 2.0)
    assert given.sampling_params.max_tokens == 5


def test_sampling_params_and_flat_fields_together() -> None:
    """A flat field is laid over sampling_params that are given beside it, whichever comes first."""
    params = SamplingParams(max_tokens=5, top_k=3)
    for fields in ({"sampling_params": params, "top_k": 1}, {"top_k": 1, "sampling_params": params}):
        assert build_request("hello", fields).sampling_params == SamplingParams(max_tokens=5, top_k=1)


def test_a_request_without_an_id_gets_one() -> None:
    """The engine chooses an id where none is given, and never the same one twice."""
    ids = {build_request("hello", {}).id for _ in range(100)}
    assert len(ids) == 100
    assert "" not in ids


@pytest.mark.parametrize(
    "prompt", ["hello", "", [1, 2, 3], (1, 2, 3), range(3), [0], [MESSAGE], (MESSAGE, MESSAGE)], ids=repr
)
def test_prompts(prompt: Any) -> None:
    """Text, token ids and chat messages are prompts, in any kind of sequence."""
    assert build_request(prompt, {}).prompt == prompt


def test_token_ids_are_told_from_messages() -> None:
    """A list of ids is a prompt of token ids; text and messages are not."""
    assert is_token_ids([1, 2])
    assert not is_token_ids("12")
    assert not is_token_ids([MESSAGE])


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        5,
        b"hello",
        bytearray(b"hello"),
        {"role": "user"},
        {1, 2},
        [],
        (),
        [True],
        [1, -1],
        [1, "hello"],
        [1.0],
        ["hello"],
        [MESSAGE, 1],
        [1, MESSAGE],
        [{"role": "user", "content": "hello"}],
        [ChatMessage(role="user", content=None)],  # type: ignore[arg-type]
        [MESSAGE, ChatMessage(role=1, content="hello")],  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_bad_prompts(prompt: Any) -> None:
    """Anything else is refused, with a message that names the prompt."""
    with pytest.raises(RequestValidationError, match="prompt"):
        build_request(prompt, {})


@pytest.mark.parametrize(
    ("field", "nearest"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("stop_strings", "stop"), ("clientid", "client_id")],
)
def test_unknown_field(field: str, nearest: str) -> None:
    """An unknown field is a TypeError, as for any function, that names the nearest one."""
    with pytest.raises(TypeError, match=f"unknown request field '{field}'; did you mean '{nearest}'?"):
        build_request("hello", {field: 1})


def test_prompt_is_no_field() -> None:
    """The prompt cannot be given a second time as a field, and the message does not suggest it."""
    with pytest.raises(TypeError, match="prompt") as caught:
        build_request("hello", {"prompt": "bye"})
    assert "did you mean 'prompt'" not in str(caught.value)


WRONG_TYPES: list[tuple[str, Any]] = [
    ("id", 5),
    ("model_id", 5),
    ("sampling_params", {"max_tokens": "5"}),
    ("sampling_params", SamplingParams(max_tokens="5")),  # type: ignore[arg-type]
    ("sampling_params", SamplingParams(seed=object())),  # type: ignore[arg-type]
    ("sampling_params", None),
    ("priority", "high"),
    ("priority", 7),
    ("client_id", None),
    ("client_id", 5),
    ("session_id", 5),
    ("deadline_s", "soon"),
    ("metadata", {"a": 1}),
    ("metadata", ["a"]),
    ("max_tokens", "5"),
    ("max_tokens", 5.0),
    ("max_tokens", True),
    ("temperature", "hot"),
    ("temperature", object()),
    ("top_k", 1.5),
    ("stop", "x"),
    ("stop", [5]),
    ("stop", None),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("ignore_eos", 1),
    ("skip_special_tokens", None),
    ("include_stop", "yes"),
    ("seed", 0.5),
    ("n", True),
    ("logit_bias", [1]),
    ("response_format", "json"),
    ("response_format", ResponseFormat(type=5)),  # type: ignore[arg-type]
    ("mirostat", 2),
]
WRONG_VALUES: list[tuple[str, Any]] = [
    ("deadline_s", 0),
    ("deadline_s", -1.0),
    ("deadline_s", NAN),
    ("deadline_s", float("inf")),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**40),
    ("temperature", -0.1),
    ("temperature", 101.0),
    ("temperature", NAN),
    ("temperature", float("inf")),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", -0.1),
    ("top_p", NAN),
    ("top_k", -1),
    ("top_k", 2**40),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", NAN),
    ("seed", -1),
    ("seed", 2**63),
    ("stop", [""]),
    ("stop", ["x" * (MAX_STOP_LENGTH + 1)]),
    ("stop", ["x"] * (MAX_STOP_STRINGS + 1)),
    ("stop_token_ids", list(range(MAX_STOP_TOKENS + 1))),
]


def name_of(value: Any) -> str:
    """A short name for a parametrized test."""
    return value if isinstance(value, str) else f"{type(value).__name__} {value!r}"[:30]


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES + WRONG_VALUES, ids=name_of)
def test_bad_fields(field: str, value: Any) -> None:
    """A value of the wrong type or out of its range is refused, with a message that names the field."""
    with pytest.raises(RequestValidationError, match=field):
        build_request("hello", {field: value})


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES + WRONG_VALUES, ids=name_of)
def test_bad_fields_inside_a_request(field: str, value: Any) -> None:
    """The same values are refused where they come inside an InferenceRequest, whose constructor checks nothing."""
    if field in InferenceRequest.__struct_fields__:
        request = InferenceRequest(prompt="hello", **{field: value})
    else:
        request = InferenceRequest(prompt="hello", sampling_params=SamplingParams(**{field: value}))
    with pytest.raises(RequestValidationError, match=field):
        build_request(request, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_s", 1),
        ("max_tokens", 1),
        ("max_tokens", None),
        ("temperature", 0),
        ("temperature", 1),
        ("top_p", 1.0),
        ("top_k", 0),
        ("min_p", 0.0),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("stop", ["x" * MAX_STOP_LENGTH] * MAX_STOP_STRINGS),
        ("stop", ("a", "b")),
        ("stop_token_ids", list(range(MAX_STOP_TOKENS))),
        ("priority", 3),
        ("metadata", {}),
    ],
    ids=name_of,
)
def test_good_fields(field: str, value: Any) -> None:
    """The ends of each range are part of it, and None is good where it means the default."""
    request = build_request("hello", {field: value})
    params = request if field in InferenceRequest.__struct_fields__ else request.sampling_params
    assert getattr(params, field) == (list(value) if isinstance(value, tuple) else value)


PLANNED: list[tuple[str, Any]] = [
    ("min_tokens", 1),
    ("typical_p", 0.5),
    ("repetition_penalty", 1.1),
    ("presence_penalty", 0.5),
    ("frequency_penalty", 0.5),
    ("logit_bias", {5: 1.0}),
    ("n", 2),
    ("logprobs", 1),
    ("prompt_logprobs", 1),
    ("allowed_token_ids", [1]),
    ("bad_words", ["x"]),
    ("response_format", ResponseFormat(type="json_object")),
    ("mirostat", Mirostat()),
]


@pytest.mark.parametrize(("field", "value"), PLANNED, ids=name_of)
def test_planned_fields(field: str, value: Any) -> None:
    """What the engine cannot do yet is refused by name, never ignored; its default is taken."""
    with pytest.raises(Unsupported, match=field):
        build_request("hello", {field: value})
    default = getattr(SamplingParams(), field)
    assert build_request("hello", {field: default}).sampling_params == SamplingParams()


def test_every_field_is_tested() -> None:
    """No sampling field is left out of the tables of this file."""
    tested = {field for field, _ in [*WRONG_TYPES, *WRONG_VALUES, *PLANNED]}
    assert set(SamplingParams.__struct_fields__) <= tested


def test_requests_survive_a_round_trip() -> None:
    """A request that was built is equal to itself after a trip through msgpack."""
    for prompt in ("hello", [1, 2]):
        request = build_request(prompt, {"max_tokens": 5, "metadata": {"a": "b"}})
        assert msgspec.convert(msgspec.msgpack.decode(msgspec.msgpack.encode(request)), InferenceRequest) == request
