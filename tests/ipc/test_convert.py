"""A request that has travelled is the request that was sent."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import InferenceRequest
from ferrum_rt.ipc.convert import from_wire, to_wire
from ferrum_rt.ipc.framing import client_decoder, encode
from ferrum_rt.ipc.messages import Submit, WireRequest, WireSampling

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"ä": {"enum": [1.5, None]}}}},
}
CALL = {"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}

prompts = (
    st.text(max_size=20)
    | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
    | st.just(
        [{"role": "user", "content": "hé"}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    )
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 2**31 - 1),
        "temperature": st.none() | st.floats(0, 100),
        "top_p": st.floats(0.01, 1),
        "top_k": st.integers(0, 1000),
        "typical_p": st.floats(0.01, 1),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=5),
        "stop": st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=3),
        "seed": st.integers(0, 2**63 - 1),
        "n": st.integers(1, 128),
        "logprobs": st.none() | st.integers(0, 20),
        "prompt_logprobs": st.none() | st.integers(0, 20),
        "allowed_token_ids": st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
        "bad_words": st.lists(st.just("bad"), max_size=2),
        "skip_special_tokens": st.booleans(),
        "include_stop": st.booleans(),
        "response_format": st.sampled_from(
            [
                {"type": "json_object"},
                {"type": "json_schema", "definition": {"type": "object"}},
                {"type": "regex", "definition": "a+"},
            ]
        ),
        "priority": st.integers(0, 3),
        "client_id": st.just("somebody"),
        "session_id": st.just("s"),
        "model_id": st.just("m"),
        "deadline_s": st.floats(0.1, 1e6),
        "metadata": st.just({"a": "b"}),
        "parse_special_tokens": st.booleans(),
    },
)


def travelled(request: InferenceRequest) -> InferenceRequest:
    """Through bytes, as the daemon gets it."""
    [message] = client_decoder().feed(encode(Submit(request_id="r", request=to_wire(request), credit=1)))
    assert isinstance(message, Submit)
    prompt, given_fields = from_wire(message.request)
    return build_request(prompt, given_fields | {"id": request.id})


@settings(max_examples=200, deadline=None)
@given(prompts, fields)
def test_a_request_comes_back_equal(prompt: Any, given_fields: dict[str, Any]) -> None:
    """Whatever its fields, a request that has travelled equals the one that was sent; a schema comes as its text."""
    try:
        request = build_request(prompt, given_fields)
    except RequestValidationError:
        return  # fields that contradict one another
    form = request.sampling_params.response_format
    if form is not None and isinstance(form.definition, dict):
        request = build_request(request, {"response_format": {"type": form.type, "definition": '{"type":"object"}'}})
    assert travelled(request) == request


@pytest.mark.parametrize("choice", ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}])
def test_tools_and_mirostat_come_back_equal(choice: Any) -> None:
    """Tools travel as JSON text, with whatever is in their parameters."""
    messages = [{"role": "user", "content": "x"}]
    request = build_request(messages, {"tools": [TOOL], "tool_choice": choice, "mirostat": {"tau": 3.0, "eta": 0.2}})
    assert travelled(request) == request


def test_functions_do_not_travel() -> None:
    """A logits processor belongs to the process that made it."""

    class Processor:
        def apply(self, token_ids: list[int], logits: Any) -> Any:
            return logits

    with pytest.raises(Unsupported, match="logits_processors"):
        to_wire(build_request("x", {"logits_processors": [Processor()]}))


@pytest.mark.parametrize(
    "wire",
    [
        WireRequest(),
        WireRequest(text="x", token_ids=b"\x01\x00\x00\x00"),
        WireRequest(token_ids=b"\x01\x00\x00"),
        WireRequest(text="x", tools="["),
        WireRequest(text="x", tools="[" * 100_000),
        WireRequest(text="x", tool_choice="{"),
        WireRequest(text="x", sampling=WireSampling(allowed_token_ids=b"\x01")),
    ],
    ids=["no prompt", "two prompts", "half an id", "broken tools", "deep tools", "broken choice", "half an allowed id"],
)
def test_what_is_no_request_is_invalid(wire: WireRequest) -> None:
    """Parts that do not fit together or cannot be read are RequestValidationError."""
    with pytest.raises(RequestValidationError):
        from_wire(wire)
