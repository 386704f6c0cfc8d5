"""A server that speaks OpenAI's protocol, as a target: vLLM, SGLang, llama.cpp and others. Needs the extra ``bench``.

Requests go to ``/v1/completions`` with token ids as a prompt, and are told to generate to the last token (``ignore_eos``).
How many tokens a chunk brings its text does not say: it may hold back half a character, or bring several tokens at once. So
the server is asked for its count with each chunk (``continuous_usage_stats``). One that counts only at the end is taken to
send a token with each text, and what the total has more is counted with the last chunk.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
from httpx_sse import EventSource
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ferrum_rt.interfaces.errors import (
    BackendError,
    ConfigError,
    ConnectionLost,
    FerrumError,
    InvalidFormat,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unsupported,
)
from ferrum_rt.interfaces.types import PageCounts, RequestCounts, TokenId
from ferrum_rt.load.targets import TargetError
from ferrum_rt.load.workload import LoadRequest

CONNECT_LIMIT_S = 30.0
SILENCE_LIMIT_S = 600.0

_DONE = "[DONE]"
_MAX_QUOTED = 300
_NOT_UNDERSTOOD = (400, 404, 405, 422)
_KINDS: dict[str, type[FerrumError]] = {
    **dict.fromkeys(("http_401", "http_403"), PermissionDenied),
    **dict.fromkeys(("http_429", "http_503"), ResourceExhausted),
    **dict.fromkeys((f"http_{status}" for status in _NOT_UNDERSTOOD), Unsupported),
}
_TRACE_CONTEXT = TraceContextTextMapPropagator()


class _Served(msgspec.Struct):
    id: str
    max_model_len: int | None = None  # vLLM's


class _ServedList(msgspec.Struct):
    data: list[_Served]


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_CHUNKS = msgspec.json.Decoder(_Chunk)


@asynccontextmanager
async def open_openai(url: str, model: str | None = None) -> AsyncIterator["OpenAITarget"]:
    """The server at ``url`` (with or without ``/v1``), asked for its models, and tried with a request of one token. Raises
    ConfigError, NotFound where it has no such model, ConnectionLost where nobody answers, Unsupported where it refuses what
    a load needs, and what else its status means."""
    base = _base(url)
    # Every request has a connection of its own if need be: one that waited for another's would be sent late.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(SILENCE_LIMIT_S, connect=CONNECT_LIMIT_S, pool=None)
    # A proxy from the environment would be measured too.
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:
        try:
            target = OpenAITarget(client, base, await _choose(client, base, model))
            await target.probe()
        except httpx.HTTPError as error:
            raise ConnectionLost(f"{base}: {error or type(error).__name__}") from error
        except TargetError as error:
            raise _KINDS.get(error.code, BackendError)(f"{base}: {error}") from error
        yield target


class OpenAITarget:
    """One model of one server."""

    def __init__(self, client: httpx.AsyncClient, base: str, served: _Served) -> None:
        self._client, self._url, self._served = client, f"{base}/v1/completions", served

    @property
    def model(self) -> str:
        return self._served.id

    @property
    def max_model_len(self) -> int | None:
        """None where the server does not say."""
        return self._served.max_model_len

    @asynccontextmanager
    async def stream(self, request: LoadRequest) -> AsyncIterator[AsyncIterator[int]]:
        """Raises TargetError, by its code: ``http_STATUS``, ``stream_error`` for an error that is told in the stream,
        ``broken_stream`` for one that ends before its end; or what httpx raises."""
        headers = {"content-type": "application/json"}
        _TRACE_CONTEXT.inject(headers)  # of the span that is current here, if there is one
        async with self._client.stream("POST", self._url, content=self._body(request), headers=headers) as response:
            if not response.is_success:
                await response.aread()
                raise _refusal(response)
            yield _count(response)

    async def state(self) -> tuple[RequestCounts, PageCounts] | None:
        """The protocol has no question for it."""
        return None

    async def probe(self) -> None:
        """Send the smallest request that has everything in it. Raises as ``stream`` does."""
        async with self.stream(LoadRequest(index=0, token_ids=[TokenId(1)], output_tokens=1)) as counts:
            async for _ in counts:
                pass

    def _body(self, request: LoadRequest) -> bytes:
        return msgspec.json.encode(
            {
                "model": self.model,
                "prompt": request.token_ids,
                "max_tokens": request.output_tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        )


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{url!r} is no URL of a server; write it as http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1")


async def _choose(client: httpx.AsyncClient, base: str, model: str | None) -> _Served:
    response = await client.get(f"{base}/v1/models")
    if not response.is_success:
        raise _refusal(response)
    try:
        served = msgspec.json.decode(response.content, type=_ServedList).data
    except msgspec.DecodeError as error:
        raise InvalidFormat(f"{base}/v1/models: this is no list of models: {error}") from error
    names = ", ".join(item.id for item in served) or "none"
    if model is None:
        if len(served) != 1:
            raise ConfigError(f"{base} has several models or none; choose one by its name: {names}")
        return served[0]
    for item in served:
        if item.id == model:
            return item
    raise NotFound(f"{base} has no model {model!r}; it has: {names}")


def _refusal(response: httpx.Response) -> TargetError:
    """Of a response that has been read."""
    status, said = response.status_code, " ".join(response.text.split())[:_MAX_QUOTED]
    hint = ""
    if status in _NOT_UNDERSTOOD and response.request.method == "POST":
        hint = (
            "; a load needs token ids as a prompt and the fields ignore_eos and stream_options.continuous_usage_stats, as "
            "vLLM has them, and a server that refuses what it does not know cannot be measured"
        )
    return TargetError(f"http_{status}", f"it answers {status} {response.reason_phrase}: {said}{hint}")


async def _count(response: httpx.Response) -> AsyncIterator[int]:
    """Tokens by chunks, to the stream's end: a connection that has more to read could not be used again."""
    counted, has_ended = 0, False
    async for event in EventSource(response).aiter_sse():
        if event.data == _DONE:
            has_ended = True
            continue
        chunk = _decode(event.data)
        has_ended = has_ended or any(choice.finish_reason is not None for choice in chunk.choices)
        total = _total(chunk.choices, chunk.usage, counted)
        if total > counted:
            yield total - counted
            counted = total
    if not has_ended:
        raise TargetError("broken_stream", "the stream ended before the generation did")


def _total(choices: Sequence[_Choice], usage: _Usage | None, counted: int) -> int:
    """Tokens up to and with this chunk."""
    if usage is not None:
        return usage.completion_tokens
    return counted + any(choice.text for choice in choices)


def _decode(data: str) -> _Chunk:
    try:
        chunk = _CHUNKS.decode(data)
    except msgspec.DecodeError as error:
        raise TargetError("stream_error", f"this is no chunk: {error}") from error
    if chunk.error is not None:
        raise TargetError("stream_error", f"the server says {str(chunk.error)[:_MAX_QUOTED]}")
    return chunk
