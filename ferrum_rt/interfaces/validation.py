"""One check per field of a request: each takes the field's name and what the caller wrote, and returns it in the form that
the Structs have, or raises RequestValidationError. They run on the event loop, so lengths are looked at first."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import msgspec

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.types import (
    FunctionName,
    Mirostat,
    NamedTool,
    Priority,
    ResponseFormat,
    SamplingParams,
    Tool,
    ToolChoice,
    ToolFunction,
)

Check = Callable[[str, Any], Any]

MAX_TOKEN_ID = 2**31 - 1
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LENGTH = 1024
# Each entry is checked on the event loop; a bias on more tokens than this is a LogitsProcessor's business.
MAX_LOGIT_BIASES = 1024
# More than any vocabulary: whether each token exists is for check_vocabulary to say.
MAX_ALLOWED_TOKENS = 2**20
MAX_DEFINITION_LENGTH = 2**18
MAX_JSON_NODES = 10_000
MAX_JSON_DEPTH = 64
MAX_ID_LENGTH = 256
MAX_METADATA = 64
MAX_METADATA_LENGTH = 4096
MAX_TOOLS = 128
MAX_DESCRIPTION_LENGTH = 2**16
MAX_LOGITS_PROCESSORS = 16
_MAX_STRUCT_FIELDS = 64

_SHOWN = 40
_ROLE = re.compile(r"[\w .-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_PRIORITIES: dict[str, Priority] = {priority.name.lower(): priority for priority in Priority}
_HAS_DEFINITION = {"text": False, "json_object": False, "json_schema": True, "regex": True, "grammar": True}


class _Range(NamedTuple):
    """From ``low`` to ``high``, both included unless ``above`` shuts ``low`` out. ``hint`` says what to do instead."""

    low: float
    high: float
    whole: bool = False
    above: bool = False
    hint: str = ""


_RANGES = {
    "max_tokens": _Range(1, MAX_TOKENS, whole=True),
    "min_tokens": _Range(0, MAX_TOKENS, whole=True),
    "temperature": _Range(0, 100),
    "top_p": _Range(0, 1, above=True, hint="; for greedy sampling set temperature to 0"),
    "top_k": _Range(0, MAX_TOKENS, whole=True, hint="; 0 keeps every token"),
    "min_p": _Range(0, 1),
    "typical_p": _Range(0, 1, above=True, hint="; 1 turns it off"),
    "repetition_penalty": _Range(0, 100, above=True, hint="; 1 turns it off"),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "logit_bias": _Range(-100, 100, hint="; -100 all but bans a token, allowed_token_ids bans all others"),
    "seed": _Range(0, MAX_SEED, whole=True),
    "n": _Range(1, MAX_N, whole=True),
    "logprobs": _Range(0, MAX_LOGPROBS, whole=True),
    "prompt_logprobs": _Range(0, MAX_LOGPROBS, whole=True),
    "mirostat.tau": _Range(0, 100, above=True),
    "mirostat.eta": _Range(0, 100, above=True),
    # 68 years: what a clock can add to its time without overflow.
    "deadline_s": _Range(0, 2**31, above=True),
}


def refuse(name: str, wanted: str, found: str) -> NoReturn:
    """Raises RequestValidationError. ``found`` must be short and quote no prompt."""
    raise RequestValidationError(f"{name}: must be {wanted}, got {found}")


def shown(value: object) -> str:
    """The value, or what kind of thing it is where it may be long."""
    if isinstance(value, str):
        text = repr(value[:_SHOWN])[: 2 * _SHOWN]
        return text if len(value) <= _SHOWN else f"{text}… ({len(value)} characters)"
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    return kind_of(value)


def kind_of(value: object) -> str:
    """What kind of thing a value is, without any of its content."""
    if isinstance(value, str):
        return f"{len(value)} characters"
    kind = type(value).__name__[:_SHOWN]
    return f"{kind} of {len(value)}" if isinstance(value, list | tuple | dict | set) else kind


def number(name: str, value: Any, bounds: _Range | None = None) -> Any:
    """An int or a float in the range of its field; no bool, no NaN, no infinity."""
    low, high, whole, above, hint = bounds or _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        refuse(name, "an integer" if whole else "a number", shown(value))
    # Written so that NaN, which compares False, is refused too.
    if not low <= value <= high or (above and value == low):
        span = f"above {low} and at most {high}" if above else f"between {low} and {high}"
        refuse(name, span, f"{shown(value)}{hint}")
    return int(value) if whole else float(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        refuse(name, "True or False", shown(value))
    return value


def text(name: str, value: Any, high: int, low: int = 1) -> str:
    """A string of ``low`` to ``high`` characters that UTF-8 can hold. The message does not quote it."""
    if not isinstance(value, str) or not low <= len(value) <= high:
        refuse(name, f"text of {low} to {high} characters", kind_of(value))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RequestValidationError(f"{name}: holds a lone surrogate, which is no character") from None
    return value


def role(name: str, value: Any) -> str:
    """The one string of a message that chat templates compare, and so take as it is: it must hold no special token."""
    if not isinstance(value, str) or not _ROLE.fullmatch(value):
        refuse(name, "1 to 64 letters, digits, spaces, dots, dashes or underscores", kind_of(value))
    return value


def optional(check: Check) -> Check:
    """The same check, but None is good as well."""
    return lambda name, value: None if value is None else check(name, value)


def identifier(name: str, value: Any) -> str:
    """Something that stands in logs and traces."""
    checked = text(name, value, MAX_ID_LENGTH)
    if _CONTROL.search(checked):
        raise RequestValidationError(f"{name}: must hold no control characters, got {shown(checked)}")
    return checked


def entries(name: str, value: Any, high: int, of: str) -> list[Any] | tuple[Any, ...]:
    """A list or tuple of at most ``high``; what is in it is for the caller to check."""
    if not isinstance(value, list | tuple):
        refuse(name, f"a list of {of}", kind_of(value))
    if len(value) > high:
        refuse(name, f"a list of at most {high} {of}", str(len(value)))
    return value


def strings(name: str, value: Any, count: int, length: int) -> list[str]:
    """A list of at most ``count`` strings of 1 to ``length`` characters."""
    return [text(f"{name}[{i}]", item, length) for i, item in enumerate(entries(name, value, count, "strings"))]


def token_ids(name: str, ids: list[Any]) -> list[int]:
    """``ids`` itself, if all are ints that could be tokens. No Python is run for each, so a long prompt is quick."""
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= MAX_TOKEN_ID):
        return ids
    is_sound = (type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in ids)
    index = list(is_sound).index(False)
    found = shown(ids[index]) if type(ids[index]) is int else kind_of(ids[index])
    raise RequestValidationError(f"{name}: must hold token ids, ints from 0 to {MAX_TOKEN_ID}; [{index}] is {found}")


def fields_of(name: str, value: Any, kind: type[msgspec.Struct], ignored: str = "") -> dict[str, Any]:
    """The fields of a Struct, or of a dict in its shape, unchecked. A key that the Struct lacks is refused, unless there is
    nothing under it (other libraries write out every field they know) or it is ``ignored``."""
    if isinstance(value, kind):
        return {field: getattr(value, field) for field in kind.__struct_fields__}
    if not isinstance(value, Mapping):
        refuse(name, f"a {kind.__name__} or a dict", kind_of(value))
    if len(value) > _MAX_STRUCT_FIELDS:
        refuse(name, f"a {kind.__name__}, which has {len(kind.__struct_fields__)} fields", kind_of(value))
    fields = {}
    for key, item in value.items():
        if key in kind.__struct_fields__:
            fields[key] = item
        elif key != ignored and not (item is None or (isinstance(item, list | dict | str) and not item)):
            if not isinstance(key, str) or not key.isidentifier():
                raise RequestValidationError(f"{name}: holds a key that is no field's name")
            near = nearest(key, kind.__struct_fields__)
            raise RequestValidationError(f"{name}: unknown field {shown(key)}; did you mean {near!r}?")
    return fields


def nearest(name: str, names: Iterable[str]) -> str:
    """The most similar of ``names``. The name is cut, as the search takes the longer the longer it is."""
    return difflib.get_close_matches(name[:_SHOWN], names, n=1, cutoff=0.0)[0]


def json_tree(name: str, value: Any, budget: int = MAX_JSON_NODES) -> int:
    """Checks that ``value`` is what JSON can hold, level by level, so that no depth can overflow the stack and none that is
    shared or holds itself can run away. Returns what is left of the ``budget`` of nodes."""
    level, length = [value], 0
    for _ in range(MAX_JSON_DEPTH):
        below: list[Any] = []
        for item in level:
            if not isinstance(item, dict | list | tuple):
                length += _json_leaf(name, item)
            elif len(below) + len(item) > budget:
                raise RequestValidationError(f"{name}: too large; at most {MAX_JSON_NODES} values go")
            elif isinstance(item, dict):
                length += sum(len(text(f"{name}, a key", key, MAX_DEFINITION_LENGTH, low=0)) for key in item)
                below.extend(item.values())
            else:
                below.extend(item)
        if length > MAX_DEFINITION_LENGTH:
            raise RequestValidationError(f"{name}: too large; at most {MAX_DEFINITION_LENGTH} characters go")
        if not below:
            return budget
        budget -= len(below)
        level = below
    raise RequestValidationError(f"{name}: nested more than {MAX_JSON_DEPTH} levels deep")


def _json_leaf(name: str, item: Any) -> int:
    """The characters of a string, else 0."""
    if isinstance(item, str):
        return len(text(name, item, MAX_DEFINITION_LENGTH, low=0))
    if not (item is None or isinstance(item, int | float)) or (isinstance(item, float) and not math.isfinite(item)):
        raise RequestValidationError(f"{name}: holds {shown(item)}, which JSON cannot express")
    if isinstance(item, int) and not -(2**63) <= item < 2**64:
        raise RequestValidationError(f"{name}: holds {shown(item)}; integers of at most 64 bits go")
    return 0


def _stop(name: str, value: Any) -> list[str]:
    return strings(name, [value] if isinstance(value, str) else value, MAX_STOP_STRINGS, MAX_STOP_LENGTH)


def _bad_words(name: str, value: Any) -> list[str]:
    return strings(name, value, MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH)


def _stop_token_ids(name: str, value: Any) -> list[int]:
    return token_ids(name, list(entries(name, value, MAX_STOP_TOKENS, "token ids")))


def _allowed_token_ids(name: str, value: Any) -> list[int]:
    ids = list(entries(name, value, MAX_ALLOWED_TOKENS, "token ids"))
    if not ids:
        raise RequestValidationError(f"{name}: an empty list allows no token at all; None allows every token")
    return token_ids(name, ids)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    """Keys may be strings, as they are in JSON."""
    if not isinstance(value, Mapping):
        refuse(name, "a dict from token id to bias", shown(value))
    if len(value) > MAX_LOGIT_BIASES:
        refuse(name, f"a dict of at most {MAX_LOGIT_BIASES} entries", f"{len(value)}; a LogitsProcessor can do more")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdigit() else key
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_TOKEN_ID:
            refuse(name, f"keyed by token ids, ints from 0 to {MAX_TOKEN_ID}", shown(key))
        if token in biases:
            raise RequestValidationError(f"{name}: token {token} stands there twice, as an int and as a string")
        biases[token] = number(f"{name}[{token}]", bias, _RANGES[name])
    return biases


def _mirostat(name: str, value: Any) -> Mirostat:
    given = fields_of(name, value, Mirostat)
    return Mirostat(**{field: number(f"{name}.{field}", item) for field, item in given.items()})


def _response_format(name: str, value: Any) -> ResponseFormat:
    """A dict may also have OpenAI's shape, where the schema stands in ``json_schema``, beside its name."""
    if isinstance(value, Mapping) and isinstance(value.get("json_schema"), Mapping) and "definition" not in value:
        value = {"type": value.get("type"), "definition": value["json_schema"].get("schema")}
    fields = fields_of(name, value, ResponseFormat)
    kind, definition = fields.get("type", "text"), fields.get("definition")
    if not isinstance(kind, str) or kind not in _HAS_DEFINITION:
        refuse(f"{name}.type", f"one of {', '.join(_HAS_DEFINITION)}", shown(kind))
    name = f"{name}.definition"
    if not _HAS_DEFINITION[kind]:
        if definition is not None:
            raise RequestValidationError(f"{name}: type {kind!r} takes none; leave it out or choose another type")
    elif kind == "json_schema" and isinstance(definition, dict):
        json_tree(name, definition)
    elif isinstance(definition, str):
        text(name, definition, MAX_DEFINITION_LENGTH)
    else:
        refuse(name, "the schema, a dict or its text" if kind == "json_schema" else f"the {kind}, text", kind_of(definition))
    # mypy does not see that being among _HAS_DEFINITION makes a string one of the literals.
    return ResponseFormat(type=kind, definition=definition)  # type: ignore[arg-type]


def _id(name: str, value: Any) -> str:
    return "" if isinstance(value, str) and not value else identifier(name, value)


def _priority(name: str, value: Any) -> Priority:
    if isinstance(value, str) and value in _PRIORITIES:
        return _PRIORITIES[value]
    if isinstance(value, bool) or not isinstance(value, int) or not min(Priority) <= value <= max(Priority):
        names = ", ".join(_PRIORITIES)
        refuse(name, f"a Priority, its number ({min(Priority):d} to {max(Priority):d}) or its name ({names})", shown(value))
    return Priority(value)


def _metadata(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        refuse(name, "a dict of strings", kind_of(value))
    if len(value) > MAX_METADATA:
        refuse(name, f"a dict of at most {MAX_METADATA} entries", str(len(value)))
    checked = {}
    for key, item in value.items():
        text(f"{name}, a key", key, MAX_ID_LENGTH)
        checked[key] = text(f"{name}[{shown(key)}]", item, MAX_METADATA_LENGTH, low=0)
    return checked


def _tools(name: str, value: Any) -> list[Tool]:
    budget, tools, seen = MAX_JSON_NODES, [], set()
    for index, item in enumerate(entries(name, value, MAX_TOOLS, "tools")):
        place = f"{name}[{index}]"
        function = fields_of(f"{place}.function", function_of(place, item, Tool), ToolFunction, ignored="strict")
        parameters = function.get("parameters")
        parameters = {} if parameters is None else parameters
        if not isinstance(parameters, dict) or (parameters and parameters.get("type") != "object"):
            refuse(f"{place}.function.parameters", 'a JSON schema of type "object", or empty', kind_of(parameters))
        budget = json_tree(f"{place}.function.parameters", parameters, budget)
        checked = ToolFunction(
            name=_function_name(f"{place}.function.name", function.get("name")),
            description=text(
                f"{place}.function.description", function.get("description") or "", MAX_DESCRIPTION_LENGTH, low=0
            ),
            parameters=parameters,
        )
        if checked.name in seen:
            raise RequestValidationError(f"{place}.function.name: {checked.name!r} is the name of a tool before it, too")
        seen.add(checked.name)
        tools.append(Tool(function=checked))
    return tools


def function_of(name: str, value: Any, kind: type[msgspec.Struct]) -> Any:
    """What ``function`` holds in a Tool, NamedTool or ToolCall, whose ``type`` can be nothing else."""
    fields = fields_of(name, value, kind)
    if fields.get("type", "function") != "function":
        refuse(f"{name}.type", "'function'", kind_of(fields["type"]))
    return fields.get("function")


def _function_name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _FUNCTION_NAME.fullmatch(value):
        refuse(name, "1 to 64 of the characters a-z, A-Z, 0-9, _, . and -", shown(value))
    return value


def _tool_choice(name: str, value: Any) -> ToolChoice:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            refuse(name, "'none', 'auto', 'required' or a NamedTool", shown(value))
        return value  # type: ignore[return-value]  # nor does it narrow a string by ``not in``
    function = fields_of(f"{name}.function", function_of(name, value, NamedTool), FunctionName)
    return NamedTool(function=FunctionName(name=_function_name(f"{name}.function.name", function.get("name"))))


def _logits_processors(name: str, value: Any) -> list[Any]:
    processors = entries(name, value, MAX_LOGITS_PROCESSORS, "objects with a method apply")
    for index, processor in enumerate(processors):
        if isinstance(processor, type) or not callable(getattr(processor, "apply", None)):
            found = f"the class {processor.__name__[:_SHOWN]}" if isinstance(processor, type) else kind_of(processor)
            refuse(f"{name}[{index}]", "an object with a method apply(token_ids, logits)", found)
    return list(processors)


SAMPLING_CHECKS: dict[str, Check] = {field: number for field in SamplingParams.__struct_fields__ if field in _RANGES} | {
    "logit_bias": _logit_bias,
    "stop": _stop,
    "stop_token_ids": _stop_token_ids,
    "ignore_eos": flag,
    "allowed_token_ids": _allowed_token_ids,
    "bad_words": _bad_words,
    "skip_special_tokens": flag,
    "include_stop": flag,
    "response_format": _response_format,
    "mirostat": _mirostat,
}
REQUEST_CHECKS: dict[str, Check] = {
    "id": _id,
    "model_id": identifier,
    "priority": _priority,
    "client_id": identifier,
    "session_id": identifier,
    "deadline_s": number,
    "metadata": _metadata,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "parse_special_tokens": flag,
    "logits_processors": _logits_processors,
}
