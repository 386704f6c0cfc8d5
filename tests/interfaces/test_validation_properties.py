"""Whatever a caller writes, admission takes it or says in one short sentence which field is wrong."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import (
    ChatMessage,
    InferenceRequest,
    Mirostat,
    ResponseFormat,
    SamplingParams,
    Tool,
    ToolCall,
    ToolFunction,
)
from ferrum_rt.interfaces.validation import REQUEST_CHECKS, SAMPLING_CHECKS

# Found in no message: what a prompt says is private.
SECRET = "the launch code is 0000"
CHAT = [ChatMessage(role="user", content=SECRET)]


class Applies:
    def apply(self, token_ids: Any, logits: Any) -> Any:
        return logits


def starts_with_field(message: str, name: str) -> bool:
    return message.startswith(name) and message[len(name)] in ":.[,"


numbers = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 2**200, 1e308, 5e-324])
)
words = st.one_of(
    st.text(max_size=8),
    st.text(st.characters(categories=["Cs", "Cc", "Lo"]), max_size=4),
    st.sampled_from(["text", "json_schema", "regex", "required", "function", "high", "12", "object", "\ud800"]),
)
keys = st.one_of(
    words,
    st.integers(-2, 2**32),
    st.none(),
    st.sampled_from(
        ["type", "definition", "json_schema", "schema", "function", "name", "parameters", "tau", "role", "content"]
    ),
)
leaves = st.one_of(st.none(), numbers, words, st.binary(max_size=4), st.builds(object), st.builds(Applies))
junk = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(keys, inner, max_size=3),
        st.frozensets(st.integers(), max_size=2),
        st.builds(lambda a, b: ResponseFormat(type=a, definition=b), inner, inner),
        st.builds(lambda a, b: Tool(function=ToolFunction(name=a, parameters=b)), inner, inner),
        st.builds(lambda a, b: ChatMessage(role=a, tool_calls=[ToolCall(id=a, function=b)]), inner, inner),
        st.builds(lambda a, b: SamplingParams(stop=a, logit_bias=b), inner, inner),
        st.builds(lambda a: Mirostat(tau=a), inner),
    ),
    max_leaves=5,
)
field_names = st.sampled_from([*SAMPLING_CHECKS, *REQUEST_CHECKS, "sampling_params"])


def outcome(prompt: Any, fields: dict[str, Any]) -> InferenceRequest | str:
    """The request, or the message with which it is refused. Anything else that is raised fails the test."""
    try:
        return build_request(prompt, fields)
    except RequestValidationError as error:
        return str(error)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.dictionaries(field_names, junk, min_size=1, max_size=3), st.sampled_from([SECRET, CHAT, [1, 2]]))
def test_junk_is_taken_or_refused(fields: dict[str, Any], prompt: Any) -> None:
    """Whatever a field holds, there is a sound request, or a short message that names a field and quotes no prompt."""
    result = outcome(prompt, fields)
    if isinstance(result, str):
        assert any(starts_with_field(result, name) for name in (*SAMPLING_CHECKS, *fields)), result
        assert len(result) < 300
        assert SECRET not in result
    else:
        assert build_request(result, {}) == result


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        junk, st.lists(st.one_of(junk, st.dictionaries(keys, st.one_of(junk, st.just(SECRET)), max_size=4)), max_size=3)
    )
)
def test_junk_prompts_are_taken_or_refused(prompt: Any) -> None:
    """Whatever the prompt is, it comes out as text, ids or messages, or a short message names it and quotes nothing."""
    result = outcome(prompt, {})
    if isinstance(result, str):
        assert starts_with_field(result, "prompt")
        assert len(result) < 300
        assert SECRET not in result
    else:
        built = result.prompt
        assert isinstance(built, str) or {type(item) for item in built} in ({int}, {ChatMessage})
