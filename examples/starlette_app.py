"""A web application with a language model inside: text that streams to the client as it is generated.

    uvicorn --app-dir examples starlette_app:app
    curl --no-buffer localhost:8000/generate --json '{"prompt": "class Queue:", "max_tokens": 200}'

Stop curl half-way and GET /status counts one more cancelled request, and no active pages. Nothing below says so: a client
that goes away cancels the task that serves it, and leaving ``async with engine.infer_stream(...)``, in whatever way,
frees all that the request held.
"""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import ferrum_rt


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """What a client may choose. Its priority and its client_id are not among it."""

    prompt: str
    max_tokens: int = 256
    temperature: float | None = None


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, ferrum_rt.InferenceEngine]]:
    async with ferrum_rt.open_runtime() as engine:
        yield {"engine": engine}


class Generate:
    """POST /generate. An ASGI application of its own, so that the whole response happens inside the ``async with``."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        engine: ferrum_rt.InferenceEngine = request.state.engine
        body = msgspec.json.decode(await request.body(), type=Body)
        async with engine.infer_stream(body.prompt, max_tokens=body.max_tokens, temperature=body.temperature) as chunks:
            response = StreamingResponse(text_of(chunks), media_type="text/plain; charset=utf-8")
            await response(scope, receive, send)


async def text_of(chunks: AsyncIterator[ferrum_rt.StreamChunk]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield chunk.text
    except ferrum_rt.FerrumError as error:  # the response has begun with 200: only the text can still say it
        yield f"\n[{error.code}: {error}]\n"


async def status(request: Request) -> Response:
    return Response(msgspec.json.encode(await request.state.engine.status()), media_type="application/json")


async def refuse(request: Request, error: Exception) -> Response:
    """What the engine, or msgspec, did not like about a request."""
    if isinstance(error, ferrum_rt.ResourceExhausted):
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": str(math.ceil(error.retry_after))})
    return JSONResponse({"error": str(error)}, 400)


app = Starlette(
    routes=[Route("/generate", Generate(), methods=["POST"]), Route("/status", status)],
    exception_handlers={ferrum_rt.FerrumError: refuse, msgspec.DecodeError: refuse},
    lifespan=lifespan,
)
