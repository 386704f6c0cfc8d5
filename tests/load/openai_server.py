"""Servers that speak OpenAI's protocol as real ones do, each under a path of its own, for uvicorn to run.

They "generate" as many tokens as they are asked for, two to a text, and say how many there are as their kind does: with each
chunk, at the end, or never. A prompt that begins with one of FAULTS meets with it.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

# A server's name → its models.
SERVERS: dict[str, list[str]] = {
    "vllm": ["demo"],
    "counts-at-the-end": ["demo"],
    "never-counts": ["demo"],
    "two-models": ["large", "small"],
    "no-models": [],
    "strict": ["demo"],
    "guarded": ["demo"],
    "full": ["demo"],
    "failing": ["demo"],
}
REFUSALS = {
    "strict": (400, "Unrecognized request argument supplied: ignore_eos"),
    "guarded": (401, "no key"),
    "full": (503, "full"),
    "failing": (500, "a fault"),
}
BUSY, ERROR, BROKEN, NONSENSE, HANGS_UP, NO_STREAM = FAULTS = range(9001, 9007)
GATHERS = 9100  # answers when so many requests are under way as the prompt's second token says

app = Starlette()
app.state.num_gathered, app.state.all_here = 0, asyncio.Event()
app.state.num_open = 0


async def models(request: Request) -> Response:
    server = request.path_params["server"]
    if server not in SERVERS:
        return PlainTextResponse("nothing here", 404)
    length = {"max_model_len": 64} if server == "vllm" else {}
    data = [{"id": name, "object": "model", **length} for name in SERVERS[server]]
    return JSONResponse({"object": "list", "data": data})


async def completions(request: Request) -> Response:
    server, body = request.path_params["server"], msgspec.json.decode(await request.body())
    if server in REFUSALS:
        status, message = REFUSALS[server]
        return JSONResponse({"error": {"message": message}}, status)
    app.state.last = {"body": body, "traceparent": request.headers.get("traceparent")}
    first = body["prompt"][0]
    if first == BUSY:
        return JSONResponse({"error": {"message": "later"}}, 503)
    if first == NO_STREAM:
        return JSONResponse({"choices": [{"text": "x"}]})
    return StreamingResponse(counted(events(server, body, first)), media_type="text/event-stream")


async def counted(stream: AsyncIterator[str]) -> AsyncIterator[str]:
    app.state.num_open += 1
    try:
        async for event in stream:
            yield event
    finally:
        app.state.num_open -= 1


async def events(server: str, body: dict[str, Any], first: int) -> AsyncIterator[str]:
    wanted, made = body["max_tokens"], 0
    if first == GATHERS:
        app.state.num_gathered += 1
        if app.state.num_gathered == body["prompt"][1]:
            app.state.all_here.set()
        await app.state.all_here.wait()
    while made < wanted:
        await asyncio.sleep(0.001)
        if made and first in FAULTS:
            async for event in fault(first):
                yield event
            return
        made = min(wanted, made + 2)
        text = "" if made == 4 else "x\u2028y"  # at four tokens half a character is held back
        chunk: dict[str, Any] = {
            "choices": [{"index": 0, "text": text, "finish_reason": "length" if made == wanted else None}]
        }
        if server == "vllm" and body["stream_options"]["continuous_usage_stats"]:
            chunk["usage"] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": made}
        yield event_of(chunk)
    if server != "never-counts" and body["stream_options"]["include_usage"]:
        yield event_of({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": made}})
    yield "data: [DONE]\n\n"


async def fault(first: int) -> AsyncIterator[str]:
    if first == ERROR:
        yield event_of({"error": {"message": "the engine died", "code": 500}})
    elif first == NONSENSE:
        yield "data: {nonsense\n\n"
    elif first == HANGS_UP:
        raise ConnectionResetError


def event_of(chunk: dict[str, Any]) -> str:
    return f": a comment\ndata: {msgspec.json.encode(chunk).decode()}\n\n"


async def num_open(request: Request) -> Response:
    """Streams that have not come to their end."""
    return JSONResponse(app.state.num_open)


async def last(request: Request) -> Response:
    """What was asked last."""
    return JSONResponse(app.state.last)


app.routes.extend(
    [
        Route("/last", last),
        Route("/open", num_open),
        Route("/{server}/v1/models", models),
        Route("/{server}/v1/completions", completions, methods=["POST"]),
    ]
)
