"""Chat messages and tools to a prompt, by the model's own jinja2 template."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro

from ferrum_rt.interfaces.errors import RequestValidationError, TokenizerError, without_words
from ferrum_rt.interfaces.types import ChatMessage, Tool, ToolCall
from ferrum_rt.runtime.text.template_budget import TemplateLimitError
from ferrum_rt.runtime.text.template_guard import GuardedEnvironment

# Characters. The longest templates in use have some ten thousand.
MAX_TEMPLATE = 1 << 17
# Of what a template says about a failure, so much is passed on.
MAX_COMPLAINT = 1000
# The C library takes 256 characters for each of a time's pattern.
MAX_TIME_PATTERN = 1000

Protect = Callable[[str], str]


def _as_it_is(text: str) -> str:
    return text


class ChatTemplate:
    """Compiled once; thread-safe. ``special_tokens`` are the names, such as ``bos_token``, that templates expect to find.

    Templates see what transformers gives them. They are not trusted: what Python has inside is out of their reach, and one
    that takes too long or makes too much fails its request (template_guard.py).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(f"{origin}: the chat template is longer than {MAX_TEMPLATE} characters")
        self._environment = GuardedEnvironment({"tojson": _to_json}, [loopcontrols, _Generation])
        self._environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.source, self._special_tokens = source, dict(special_tokens)
        try:
            self._template = self._environment.template(source)
        except Exception as error:  # beside jinja2's own, what Python says to the code that comes of it
            raise TokenizerError(f"{origin}: the chat template is not valid jinja2: {error}") from error

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), protect: Protect = _as_it_is) -> str:
        """The prompt, ending where the assistant is to go on. ``protect`` is applied to every string of the caller's but the
        roles, which templates compare. Raises RequestValidationError where the template refuses, fails or takes too much."""
        try:
            variables = {
                **self._special_tokens,
                "messages": [_turn(message, protect) for message in messages],
                "tools": [_tool(tool, protect) for tool in tools] or None,
                "documents": None,
                "add_generation_prompt": True,
            }
            return self._template.render(variables, **self._environment.budget())
        except TemplateLimitError as error:
            raise RequestValidationError(f"prompt: the model's chat template was stopped: {error}") from None
        except jinja2.TemplateError as error:
            fault = f"prompt: the model's chat template refuses these messages: {self._words_of(error)}"
            raise RequestValidationError(fault) from None
        except Exception as error:  # a template can raise whatever the values it touches raise
            raise without_words(RequestValidationError, "prompt: the model's chat template failed", error) from None

    def _words_of(self, error: jinja2.TemplateError) -> str:
        """What the template itself says, if it says nothing else: it can put together a message from what it was given."""
        said = str(error)
        return said[:MAX_COMPLAINT] if said in self.source else type(error).__name__


def _turn(message: ChatMessage, protect: Protect) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": protect(message.content)}
    if message.name is not None:
        turn["name"] = protect(message.name)
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, protect) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = protect(message.tool_call_id)
    return turn


def _call(call: ToolCall, protect: Protect) -> dict[str, Any]:
    """Arguments that are a JSON object are given as one, for templates write it in ways of their own."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        arguments = call.function.arguments
    function = {"name": protect(call.function.name), "arguments": _protected(arguments, protect)}
    return {"id": protect(call.id), "type": call.type, "function": function}


def _tool(tool: Tool, protect: Protect) -> dict[str, Any]:
    function = tool.function
    return {
        "type": tool.type,
        "function": {
            "name": protect(function.name),
            "description": protect(function.description),
            "parameters": _protected(function.parameters, protect),
        },
    }


def _protected(value: Any, protect: Protect) -> Any:
    """A JSON value with every string in it protected, keys too."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, dict):
        return {_protected(key, protect): _protected(item, protect) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_protected(item, protect) for item in value]
    return value


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training. Here its content is just shown."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("show"), [], [], body, lineno=lineno)

    def show(self, caller: Macro) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_TIME_PATTERN:
        raise jinja2.TemplateError(f"a pattern for the time is longer than {MAX_TIME_PATTERN} characters")
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own this escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
