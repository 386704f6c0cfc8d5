"""Chat messages to a prompt, by the model's own jinja2 template, in jinja2's sandbox."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ferrum_rt.interfaces.errors import RequestValidationError, TokenizerError
from ferrum_rt.interfaces.types import ChatMessage, Tool


class ChatTemplate:
    """Compiled once. ``special_tokens`` are the names, such as ``bos_token``, that templates expect to find."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{origin}: the chat template is not valid jinja2: {error}") from error

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), protect: Callable[[str], str] = str
    ) -> str:
        """The prompt, ending where the assistant is to go on."""
        turns = [{"role": protect(message.role), "content": protect(message.content)} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._special_tokens)
        except jinja2.TemplateError as error:
            raise RequestValidationError(f"prompt: the model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template can raise whatever the values it touches raise
            raise RequestValidationError(f"prompt: the model's chat template failed: {error!r}") from error


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training. Here its content is just shown."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
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
