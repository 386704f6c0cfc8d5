"""From what a caller wrote to a checked InferenceRequest. Shared by the in-process engine and the socket client."""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, TypedDict

import msgspec

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.types import (
    ChatMessage,
    ClientId,
    FunctionCall,
    InferenceRequest,
    Mirostat,
    ModelId,
    NamedTool,
    Priority,
    Prompt,
    RequestId,
    ResponseFormat,
    SamplingParams,
    SessionId,
    Tool,
    ToolCall,
    ToolChoice,
)
from ferrum_rt.interfaces.validation import (
    MAX_ID_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    REQUEST_CHECKS,
    SAMPLING_CHECKS,
    Check,
    entries,
    fields_of,
    function_of,
    identifier,
    kind_of,
    nearest,
    optional,
    role,
    shown,
    text,
    token_ids,
)

__all__ = [
    "MAX_STOP_LENGTH",
    "MAX_STOP_STRINGS",
    "MAX_STOP_TOKENS",
    "RequestFields",
    "build_request",
    "check_sampling",
    "check_sessions",
    "check_vocabulary",
    "due_within",
    "is_token_ids",
]


class RequestFields(TypedDict, total=False):
    """Every field of InferenceRequest (but the prompt) and of SamplingParams, as keywords. A Struct may also be a dict."""

    id: RequestId
    model_id: ModelId | None
    sampling_params: SamplingParams | Mapping[str, Any]
    priority: Priority | Literal["low", "normal", "high", "critical"]
    client_id: ClientId
    session_id: SessionId | None
    deadline_s: float | None
    metadata: Mapping[str, str]
    tools: Sequence[Tool | Mapping[str, Any]]
    tool_choice: ToolChoice | Mapping[str, Any]
    parse_special_tokens: bool
    logits_processors: Sequence[Any]
    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    stop: list[str] | str
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int | None
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    allowed_token_ids: list[int] | None
    bad_words: list[str] | None
    skip_special_tokens: bool
    include_stop: bool
    response_format: ResponseFormat | Mapping[str, Any] | None
    mirostat: Mirostat | Mapping[str, Any] | None


# The longest context of the families that we run.
MAX_PROMPT_TOKENS = 2**22
MAX_MESSAGES = 10_000
MAX_TOOL_CALLS = 128
_LEAST_DEADLINE_S = 1e-3

_REQUEST_DEFAULTS = {name: getattr(InferenceRequest(prompt=""), name) for name in REQUEST_CHECKS}
_SAMPLING_DEFAULTS = {name: getattr(SamplingParams(), name) for name in SAMPLING_CHECKS}
# With Mirostat no other truncation is done, so one that is set would be ignored: field → what leaves it out.
_WITHOUT_MIROSTAT: dict[str, tuple[float | None, ...]] = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (1.0,),
}


def build_request(prompt: Prompt | InferenceRequest, fields: Mapping[str, Any]) -> InferenceRequest:
    """Merge ``fields`` into a request and check it. Runs on the event loop.

    The prompt comes out as str, list[int] or list[ChatMessage]; an empty id and a seed of None are chosen. Raises TypeError
    for an unknown field, RequestValidationError naming a wrong one.
    """
    given = dict(fields)
    if isinstance(prompt, InferenceRequest):
        request = fields_of("prompt", prompt, InferenceRequest)
        prompt = request.pop("prompt")
        given = request | given
    sampling = {}
    if "sampling_params" in given:
        sampling = fields_of("sampling_params", given.pop("sampling_params"), SamplingParams)
    of_request: dict[str, Any] = {}
    for name, value in given.items():
        if name in SAMPLING_CHECKS:
            sampling[name] = value
        elif name in REQUEST_CHECKS:
            of_request[name] = value
        else:
            _refuse_unknown(name)
    checked = _checked(sampling, SAMPLING_CHECKS, _SAMPLING_DEFAULTS)
    if checked.get("seed") is None:
        checked["seed"] = secrets.randbits(63)
    params = SamplingParams(**checked)
    _check_conflicts(params)
    checked = _checked(of_request, REQUEST_CHECKS, _REQUEST_DEFAULTS)
    if not checked.get("id"):
        checked["id"] = secrets.token_hex(8)
    built = InferenceRequest(prompt=_checked_prompt(prompt), sampling_params=params, **checked)
    _check_tools(built)
    return built


def due_within(request: InferenceRequest, limit_s: float) -> InferenceRequest:
    """A request that has no deadline of its own is due when nobody waits for it any more: in ``limit_s`` seconds, which may
    be infinite."""
    if request.deadline_s is not None or limit_s == math.inf:
        return request
    return msgspec.structs.replace(request, deadline_s=max(_LEAST_DEADLINE_S, limit_s))


def check_sampling(params: SamplingParams) -> None:
    """Raises RequestValidationError, naming the field."""
    checked = _checked(fields_of("sampling_params", params, SamplingParams), SAMPLING_CHECKS, _SAMPLING_DEFAULTS)
    _check_conflicts(SamplingParams(**checked))


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestValidationError, naming the field, where checked ``params`` speak of a token that the model lacks."""
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        ids = getattr(params, name)
        if ids and (highest := max(ids)) >= vocab_size:
            raise RequestValidationError(f"{name}: no token {highest}; the model's tokens are 0 to {vocab_size - 1}")


def check_sessions(client_id: Any, **session_ids: Any) -> None:
    """Raises RequestValidationError for a name that no request could have."""
    for name, value in (*session_ids.items(), ("client_id", client_id)):
        identifier(name, value)


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of chat messages."""
    return not isinstance(prompt, str) and isinstance(prompt[0], ChatMessage)


def is_token_ids(prompt: Prompt) -> bool:
    """Whether a prompt is a list of token ids (else it is text or chat messages)."""
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


def _refuse_unknown(name: Any) -> NoReturn:
    near = nearest(str(name), RequestFields.__annotations__)
    raise TypeError(f"unknown request field {shown(name)}; did you mean {near!r}?")


def _checked(given: Mapping[str, Any], checks: Mapping[str, Check], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields in the form of the Struct. What is left at its default, as None mostly is, needs no look."""
    return {name: value if value is defaults[name] else checks[name](name, value) for name, value in given.items()}


def _check_conflicts(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestValidationError(f"min_tokens: {params.min_tokens} is above max_tokens, which is {params.max_tokens}")
    if params.response_format is not None and params.response_format.type != "text":
        if params.ignore_eos:
            raise RequestValidationError("ignore_eos: the end token is how an output with a response_format ends; drop one")
        if params.min_tokens:
            raise RequestValidationError("min_tokens: the response_format says where the output ends; drop one")
    if params.mirostat is not None:
        if params.temperature == 0:
            raise RequestValidationError("mirostat: greedy sampling (temperature 0) leaves it nothing to do; drop one")
        for name, neutral in _WITHOUT_MIROSTAT.items():
            if getattr(params, name) not in neutral:
                raise RequestValidationError(f"mirostat: it chooses the candidates itself; leave {name} out, or mirostat")


def _check_tools(request: InferenceRequest) -> None:
    choice, params = request.tool_choice, request.sampling_params
    if request.tools and (isinstance(request.prompt, str) or is_token_ids(request.prompt)):
        raise RequestValidationError("tools: they need chat messages, whose template tells the model of them; see prompt")
    if choice in ("none", "auto"):
        return
    if not request.tools:
        raise RequestValidationError("tool_choice: there is nothing to choose; give tools")
    if isinstance(choice, NamedTool) and choice.function.name not in [tool.function.name for tool in request.tools]:
        raise RequestValidationError(f"tool_choice: {choice.function.name!r} is none of the tools")
    if params.response_format is not None and params.response_format.type != "text":
        raise RequestValidationError("tool_choice: a call that is required cannot have a response_format; drop one")
    if params.ignore_eos or params.min_tokens:
        raise RequestValidationError(
            "tool_choice: a required call says where the output ends; drop ignore_eos and min_tokens"
        )


def _checked_prompt(prompt: Any) -> str | list[int] | list[ChatMessage]:
    """No message of these quotes the prompt: it may be private, and messages are logged."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestValidationError(f"prompt: must be text, a list of token ids or of chat messages, got {kind_of(prompt)}")
    try:
        length = len(prompt)
    except OverflowError:
        length = MAX_PROMPT_TOKENS + 1
    if not length:
        raise RequestValidationError("prompt: is an empty list")
    if isinstance(prompt[0], int):
        if length > MAX_PROMPT_TOKENS:
            raise RequestValidationError(f"prompt: has {length} tokens; at most {MAX_PROMPT_TOKENS} go")
        return token_ids("prompt", list(prompt))
    if length > MAX_MESSAGES:
        raise RequestValidationError(f"prompt: has {length} messages; at most {MAX_MESSAGES} go")
    return [_checked_message(index, message) for index, message in enumerate(prompt)]


def _checked_message(index: int, message: Any) -> ChatMessage:
    name = f"prompt[{index}]"
    fields = fields_of(name, message, ChatMessage)
    content, calls = fields.get("content", ""), fields.get("tool_calls")
    calls = [] if calls is None else entries(f"{name}.tool_calls", calls, MAX_TOOL_CALLS, "calls")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RequestValidationError(f"{name}.content: must be text, got {kind_of(content)}")
    return ChatMessage(
        role=role(f"{name}.role", fields.get("role")),
        content=content,
        name=_name_or_none(f"{name}.name", fields.get("name")),
        tool_calls=[_checked_call(f"{name}.tool_calls[{at}]", call) for at, call in enumerate(calls)],
        tool_call_id=_name_or_none(f"{name}.tool_call_id", fields.get("tool_call_id")),
    )


def _checked_call(name: str, call: Any) -> ToolCall:
    fields = fields_of(name, call, ToolCall)
    function = fields_of(f"{name}.function", function_of(name, call, ToolCall), FunctionCall)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        raise RequestValidationError(f"{name}.function.arguments: must be JSON as text, got {kind_of(arguments)}")
    return ToolCall(
        id=text(f"{name}.id", fields.get("id"), MAX_ID_LENGTH),
        function=FunctionCall(name=text(f"{name}.function.name", function.get("name"), MAX_ID_LENGTH), arguments=arguments),
    )


_name_or_none = optional(lambda name, value: text(name, value, MAX_ID_LENGTH))
