"""From what a caller wrote to a checked InferenceRequest. Shared by the in-process engine and the socket client."""

import difflib
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_type_hints

import msgspec

from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.types import (
    ChatMessage,
    ClientId,
    InferenceRequest,
    Mirostat,
    ModelId,
    Priority,
    Prompt,
    RequestId,
    ResponseFormat,
    SamplingParams,
    SessionId,
    Tool,
    ToolChoice,
)


class RequestFields(TypedDict, total=False):
    """Every field of InferenceRequest (but the prompt) and of SamplingParams, as keywords."""

    id: RequestId
    model_id: ModelId | None
    sampling_params: SamplingParams
    priority: Priority
    client_id: ClientId
    session_id: SessionId | None
    deadline_s: float | None
    metadata: dict[str, str]
    tools: list[Tool]
    tool_choice: ToolChoice
    parse_special_tokens: bool
    logits_processors: list[Any]
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
    logit_bias: dict[int, float] | None
    stop: list[str]
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
    response_format: ResponseFormat | None
    mirostat: Mirostat | None


_REQUEST_TYPES = get_type_hints(InferenceRequest)
_SAMPLING_TYPES = get_type_hints(SamplingParams)

# Bounds of the numeric fields that work today: field → (lowest, highest), both included.
_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31),
    "min_p": (0.0, 1.0),
    "seed": (0, 2**63 - 1),
}
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024

# Fields whose work is not done yet: refused unless left at their default, never silently ignored.
_PLANNED = (
    "min_tokens",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "n",
    "logprobs",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "response_format",
    "mirostat",
)
_DEFAULTS = SamplingParams()


def build_request(prompt: Prompt | InferenceRequest, fields: Mapping[str, Any]) -> InferenceRequest:
    """Merge ``fields`` into a request and check it.

    Raises TypeError for an unknown field, RequestValidationError naming a wrong one, Unsupported for one that this
    engine cannot honour.
    """
    request = _checked_request(prompt) if isinstance(prompt, InferenceRequest) else InferenceRequest(prompt=prompt)
    of_request, of_sampling = {}, {}
    for key, value in fields.items():
        if key in _REQUEST_TYPES and key != "prompt":
            of_request[key] = _checked(key, value, _REQUEST_TYPES[key])
        elif key in _SAMPLING_TYPES:
            of_sampling[key] = _checked(key, value, _SAMPLING_TYPES[key])
        else:
            nearest = difflib.get_close_matches(key, RequestFields.__annotations__, n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown request field {key!r}; did you mean {nearest!r}?")
    request = msgspec.structs.replace(request, **of_request) if of_request else request
    if of_sampling:
        params = msgspec.structs.replace(request.sampling_params, **of_sampling)
        request = msgspec.structs.replace(request, sampling_params=params)
    if not request.id:
        request = msgspec.structs.replace(request, id=RequestId(secrets.token_hex(8)))
    _check_prompt(request.prompt)
    check_sampling(request.sampling_params)
    if request.deadline_s is not None and not 0 < request.deadline_s < math.inf:
        raise RequestValidationError(f"deadline_s must be a positive number of seconds, got {request.deadline_s!r}")
    return request


def is_token_ids(prompt: Prompt) -> bool:
    """Whether a non-text prompt is a list of token ids (else it is chat messages)."""
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


def _checked_request(request: InferenceRequest) -> InferenceRequest:
    """The constructor of a Struct checks no types, so a caller's request may hold anything."""
    names = (name for name in _REQUEST_TYPES if name != "prompt")
    fields = {name: _checked(name, getattr(request, name), _REQUEST_TYPES[name]) for name in names}
    return msgspec.structs.replace(request, **fields)


def _checked(key: str, value: Any, expected: Any) -> Any:
    try:
        return msgspec.convert(_plain(value), expected)
    except msgspec.ValidationError as error:
        raise RequestValidationError(f"{key}: {error}") from error


def _plain(value: Any) -> Any:
    """A Struct as a dict, and those in it too, so that msgspec looks at every field."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    return value


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise RequestValidationError(f"prompt must be text, token ids or chat messages, not {type(prompt).__name__}")
    if not prompt:
        raise RequestValidationError("prompt is an empty list")
    are_messages = isinstance(prompt[0], ChatMessage)
    for item in prompt:
        if isinstance(item, bool) or not isinstance(item, ChatMessage if are_messages else int):
            raise RequestValidationError(
                f"prompt must hold token ids or chat messages throughout, found {type(item).__name__}"
            )
        if isinstance(item, ChatMessage):
            _checked("prompt", item, ChatMessage)
        elif item < 0:
            raise RequestValidationError(f"prompt holds the negative token id {item}")


def check_sampling(params: SamplingParams) -> None:
    """Raises RequestValidationError or Unsupported, naming the field."""
    for name in _PLANNED:
        if getattr(params, name) != getattr(_DEFAULTS, name):
            raise Unsupported(f"{name} is not supported yet; leave it at its default")
    for name, (low, high) in _BOUNDS.items():
        value = getattr(params, name)
        # Written so that NaN, which compares False, is refused too.
        if value is not None and not low <= value <= high:
            raise RequestValidationError(f"{name} must be between {low} and {high}, got {value!r}")
    if params.top_p == 0.0:
        raise RequestValidationError("top_p must be above 0; for greedy sampling set temperature to 0")
    if len(params.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in params.stop):
        raise RequestValidationError(f"stop takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
    if len(params.stop_token_ids) > MAX_STOP_TOKENS:
        raise RequestValidationError(f"stop_token_ids takes at most {MAX_STOP_TOKENS} ids")
