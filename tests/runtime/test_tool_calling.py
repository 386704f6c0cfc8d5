"""Tools through the whole runtime: the demo model with chat templates that teach it formats of calls."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import ferrum_rt
from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.responses import assemble
from ferrum_rt.interfaces.types import ChatMessage, FunctionCall, ToolCall
from ferrum_rt.runtime.loading.loader import DEMO_MODEL

pytestmark = pytest.mark.slow

TURNS = "{% for m in messages %}# {{ m.role }}: {{ m.content }}{{ m.tool_calls | default([]) | tojson }}\n{% endfor %}"
TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }} <tool_call>\n{name, arguments}\n</tool_call>\n{% endif %}" + TURNS,
    "llama": '{% if tools %}{{ tools | tojson }} {"name": , "parameters": } ipython\n{% endif %}' + TURNS,
    "mistral": "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }} [TOOL_CALLS] [{\n{% endif %}" + TURNS,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "What the weather is.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8},
                    "days": {"type": "integer", "minimum": 1, "maximum": 5},
                    "unit": {"enum": ["c", "f"]},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"get_weather": TOOLS[0]["function"]["parameters"], "now": {"type": "object", "additionalProperties": False}}
ASK = [{"role": "user", "content": "How is the weather in Zürich?"}]


def with_template(directory: Path, template: str) -> str:
    """A copy of the demo model with this chat template."""
    shutil.copytree(DEMO_MODEL, directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(directory)


def check(call: ToolCall) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[call.function.name]).validate(json.loads(call.function.arguments))


@pytest.mark.parametrize("name", TEMPLATES)
async def test_a_required_call_comes_and_fits_its_schema(name: str, tmp_path: Path) -> None:
    """With tool_choice "required" at temperature 1 every output that ends is calls alone, with arguments as their schemas
    say; streamed, they add up to the same; and a function by its name is that function, once."""
    finished = 0
    async with ferrum_rt.open_runtime(with_template(tmp_path / "model", TEMPLATES[name]), dtype="float32") as engine:
        # Left to itself the demo model, which knows no calls, would hardly ever end them.
        tokenizer = engine._model.tokenizer
        assert tokenizer is not None
        [bracket] = tokenizer.encode_batch(["]"], add_special_tokens=False)
        bias = dict.fromkeys([*engine._model.eos_token_ids, *bracket], 6.0)
        fields: dict[str, Any] = {
            "tools": TOOLS,
            "temperature": 1.0,
            "max_tokens": 80,
            "n": 8,
            "seed": 0,
            "logit_bias": bias,
        }
        response = await engine.infer(ASK, tool_choice="required", **fields)
        for output in response.outputs:
            if output.finish_reason.value == "eos":
                finished += 1
                assert output.text.strip() == ""
                assert output.tool_calls
                for call in output.tool_calls:
                    check(call)
        async with engine.infer_stream(ASK, tool_choice="required", **fields) as chunks:
            streamed = assemble([chunk async for chunk in chunks], None)
        assert [without_ids(output.tool_calls) for output in streamed.outputs] == [
            without_ids(output.tool_calls) for output in response.outputs
        ]
        named = await engine.infer(ASK, tool_choice={"type": "function", "function": {"name": "now"}}, **fields)
        assert [without_ids(output.tool_calls) for output in named.outputs] == [[("now", "{}")]] * 8
    assert finished >= 3


def without_ids(calls: list[ToolCall]) -> list[tuple[str, str]]:
    assert len({call.id for call in calls}) == len(calls)
    return [(call.function.name, call.function.arguments) for call in calls]


async def test_a_call_and_its_result_go_back_to_the_model(tmp_path: Path) -> None:
    """A conversation with a call and its result is rendered by the template, as messages and as dicts."""
    call = ToolCall(id="call_1", function=FunctionCall(name="now", arguments="{}"))
    messages = [
        ChatMessage(role="user", content="What time is it?"),
        ChatMessage(role="assistant", tool_calls=[call]),
        ChatMessage(role="tool", content="12:00", tool_call_id="call_1", name="now"),
    ]
    asked = {"id": "call_1", "function": {"name": "now", "arguments": "{}"}}
    dicts: list[dict[str, Any]] = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "content": "12:00", "tool_call_id": "call_1", "name": "now"},
    ]
    async with ferrum_rt.open_runtime(with_template(tmp_path / "model", TEMPLATES["hermes"])) as engine:
        first = await engine.infer(messages, tools=TOOLS, max_tokens=8, temperature=0)
        second = await engine.infer(dicts, tools=TOOLS, max_tokens=8, temperature=0)
        without = await engine.infer(messages, tools=TOOLS, tool_choice="none", max_tokens=8, temperature=0)
    assert first.text == second.text
    assert first.usage.prompt_tokens == second.usage.prompt_tokens > without.usage.prompt_tokens


async def test_a_model_without_a_format_cannot_be_made_to_call(tmp_path: Path) -> None:
    """Where the chat template shows no calls, tools that may be called are rendered; that they must be is Unsupported."""
    async with ferrum_rt.open_runtime(with_template(tmp_path / "model", TURNS)) as engine:
        response = await engine.infer(ASK, tools=TOOLS, max_tokens=4)
        assert response.tool_calls == []
        with pytest.raises(Unsupported, match="tool_choice"):
            await engine.infer(ASK, tools=TOOLS, tool_choice="required", max_tokens=4)


async def test_parameters_that_are_no_schema_fail_their_request(tmp_path: Path) -> None:
    """A schema that cannot be compiled is its request's error, and the engine goes on."""
    parameters = {"type": "object", "properties": {"a": {"type": 7}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    async with ferrum_rt.open_runtime(with_template(tmp_path / "model", TEMPLATES["hermes"])) as engine:
        with pytest.raises(RequestValidationError, match="tools"):
            await engine.infer(ASK, tools=[tool], tool_choice="required", max_tokens=4)
        assert (await engine.infer(ASK, tools=TOOLS, tool_choice="required", max_tokens=4)).token_ids
