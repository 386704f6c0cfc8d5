"""Requests to the form they travel in, and back."""

from array import array
from collections.abc import Mapping
from sys import byteorder
from typing import Any

import msgspec

from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.requests import is_token_ids
from ferrum_rt.interfaces.types import (
    ChatMessage,
    InferenceRequest,
    ResponseFormat,
    SamplingParams,
)
from ferrum_rt.ipc.messages import WireCall, WireChatMessage, WireRequest, WireSampling

_ID_BYTES = 4
_MAX_TOOLS_LENGTH = 2**18
_MAX_CHOICE_LENGTH = 1024
# Fields of SamplingParams that have the same name and form on the wire, with their defaults; and those of InferenceRequest.
_SAMPLING = {
    name: getattr(SamplingParams(), name)
    for name in SamplingParams.__struct_fields__
    if name not in ("allowed_token_ids", "response_format", "mirostat")
}
_REQUEST = ("model_id", "client_id", "session_id", "deadline_s", "metadata", "parse_special_tokens")


def to_wire(request: InferenceRequest) -> WireRequest:
    """Of a request that ``build_request`` made. Raises Unsupported for what cannot travel."""
    if request.logits_processors:
        raise Unsupported("logits_processors work in-process only: they are functions of this process; open a runtime here")
    prompt, fields = request.prompt, dict[str, Any]()
    if isinstance(prompt, str):
        fields["text"] = prompt
    elif is_token_ids(prompt):
        fields["token_ids"] = _pack([token for token in prompt if isinstance(token, int)])
    else:
        fields["messages"] = [_message_to_wire(message) for message in prompt if isinstance(message, ChatMessage)]
    if request.tools:
        fields["tools"] = _to_json(request.tools)
    if request.tool_choice != "auto":
        fields["tool_choice"] = _to_json(request.tool_choice)
    same = {name: getattr(request, name) for name in _REQUEST}
    sampling = _sampling_to_wire(request.sampling_params)
    return WireRequest(**fields, **same, priority=int(request.priority), sampling=sampling)


def from_wire(wire: WireRequest) -> tuple[Any, dict[str, Any]]:
    """(prompt, fields), for ``build_request`` to check like those of any other caller; fields at their default are left out.
    Raises RequestValidationError where the parts of the prompt, packed token ids or JSON text are none."""
    fields: dict[str, Any] = msgspec.to_builtins(wire, builtin_types=(bytes,))
    prompts = [part for name in ("text", "token_ids", "messages") if (part := fields.pop(name, None)) is not None]
    if len(prompts) != 1:
        raise RequestValidationError(f"prompt: one of text, token_ids and messages must be there, found {len(prompts)}")
    if wire.tools:
        fields["tools"] = _from_json("tools", wire.tools, _MAX_TOOLS_LENGTH)
    if wire.tool_choice:
        fields["tool_choice"] = _from_json("tool_choice", wire.tool_choice, _MAX_CHOICE_LENGTH)
    fields |= fields.pop("sampling", {})
    if wire.sampling.allowed_token_ids is not None:
        fields["allowed_token_ids"] = _unpack("allowed_token_ids", wire.sampling.allowed_token_ids)
    if wire.sampling.response_format is not None:
        kind, definition = wire.sampling.response_format
        fields["response_format"] = {"type": kind, "definition": definition}
    if wire.sampling.mirostat is not None:
        tau, eta = wire.sampling.mirostat
        fields["mirostat"] = {"tau": tau, "eta": eta}
    return _prompt(prompts[0]), fields


def _prompt(part: str | bytes | list[dict[str, Any]]) -> Any:
    if isinstance(part, str):
        return part
    if isinstance(part, bytes):
        return _unpack("prompt", part)
    return [_message_from_wire(message) for message in part]


def _sampling_to_wire(params: SamplingParams) -> WireSampling:
    same = {name: value for name, default in _SAMPLING.items() if (value := getattr(params, name)) != default}
    allowed, form, mirostat = params.allowed_token_ids, params.response_format, params.mirostat
    return WireSampling(
        **same,
        allowed_token_ids=None if allowed is None else _pack(allowed),
        response_format=None if form is None else (form.type, _definition(form)),
        mirostat=None if mirostat is None else (mirostat.tau, mirostat.eta),
    )


def _definition(form: ResponseFormat) -> str | None:
    return _to_json(form.definition) if isinstance(form.definition, Mapping) else form.definition


def _message_to_wire(message: ChatMessage) -> WireChatMessage:
    return WireChatMessage(
        role=message.role,
        content=message.content,
        name=message.name,
        tool_calls=[
            WireCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
    )


def _message_from_wire(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": call["id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in message.pop("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def _pack(token_ids: list[int]) -> bytes:
    packed = array("I", token_ids)
    if byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def num_packed(data: bytes) -> int:
    """Token ids in packed bytes, without unpacking them."""
    return len(data) // _ID_BYTES


def _unpack(name: str, data: bytes) -> list[int]:
    if len(data) % _ID_BYTES:
        raise RequestValidationError(f"{name}: {len(data)} bytes are no whole number of token ids of {_ID_BYTES} bytes")
    packed = array("I", data)
    if byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _from_json(name: str, text: str, limit: int) -> Any:
    """Bounded before it is read: 4 MiB of empty lists take the event loop a second."""
    if len(text) > limit:
        raise RequestValidationError(f"{name}: {len(text)} characters of JSON; at most {limit} go over a connection")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestValidationError(f"{name}: not JSON: {error}") from error
