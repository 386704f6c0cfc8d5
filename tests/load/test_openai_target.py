"""A load on servers that speak OpenAI's protocol."""

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from ferrum_rt.interfaces.errors import (
    BackendError,
    ConfigError,
    ConnectionLost,
    FerrumError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unsupported,
)
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.load.driver import put_on
from ferrum_rt.load.measures import summarize
from ferrum_rt.load.openai_target import open_openai
from ferrum_rt.load.results import Limits
from ferrum_rt.load.spans import SpanRecorder
from ferrum_rt.load.workload import LoadRequest
from tests.load.fakes import ignore, run_load
from tests.load.openai_server import BROKEN, BUSY, ERROR, GATHERS, HANGS_UP, NO_STREAM, NONSENSE
from tests.load.serving import openai_servers

pytestmark = pytest.mark.slow  # a server takes a second to start


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with openai_servers() as url:
        yield url


def asked_last(url: str) -> Any:
    """The last request that the servers had."""
    return httpx.get(f"{url}/last", trust_env=False).json()


async def num_open(url: str) -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        return int((await client.get(f"{url}/open")).text)


def beginning_with(*tokens: int) -> list[LoadRequest]:
    return [
        LoadRequest(index=index, token_ids=[TokenId(token), TokenId(1)], output_tokens=7, due_s=0.0)
        for index, token in enumerate(tokens)
    ]


@pytest.mark.parametrize(
    ("server", "counts"),
    [
        ("vllm", [2, 2, 2, 1]),  # as the server says with each chunk, though one has no text
        ("counts-at-the-end", [1, 1, 1, 4]),  # a token for each text, and what was not counted when the server says how many
        ("never-counts", [1, 1, 1]),
    ],
)
async def test_tokens_are_counted_as_the_server_says(url: str, server: str, counts: list[int]) -> None:
    """A chunk's text says nothing of its tokens: seven that come in four chunks, one of which holds its text back."""
    async with open_openai(f"{url}/{server}") as target:
        repeat = await run_load(target, beginning_with(1))

    [record] = repeat.requests
    assert record.error is None
    assert [chunk.tokens for chunk in record.chunks] == counts
    assert repeat.samples == []


async def test_what_a_request_asks_for(url: str) -> None:
    """Token ids, as many tokens as the load wants and no fewer, greedy, streamed and counted."""
    async with open_openai(f"{url}/vllm/v1/") as target:
        assert (target.model, target.max_model_len) == ("demo", 64)
        await run_load(target, beginning_with(5))

    asked = asked_last(url)
    assert asked == {
        "body": {
            "model": "demo",
            "prompt": [5, 1],
            "max_tokens": 7,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        "traceparent": None,
    }


async def test_a_request_takes_its_trace_along(url: str, recorder: SpanRecorder) -> None:
    """Where spans are recorded the server is told whose child its own are."""
    async with open_openai(f"{url}/vllm") as target:
        [record] = (await run_load(target, beginning_with(1))).requests

    [span] = recorder.take()
    assert span.trace_id == record.trace_id
    asked = asked_last(url)
    assert asked["traceparent"].startswith(f"00-{span.trace_id}-{span.span_id}-")


async def test_no_pool_holds_requests_back(url: str) -> None:
    """Of 150 requests that are due at once all are under way at once, though the library's own limit is a hundred: none is
    answered before all have come."""
    load = [
        LoadRequest(index=index, token_ids=[TokenId(GATHERS), TokenId(150)], output_tokens=2, due_s=0.0)
        for index in range(150)
    ]
    async with open_openai(f"{url}/vllm") as target:
        repeat = await run_load(target, load)

    assert [record.error for record in repeat.requests] == [None] * 150


async def test_errors_count_by_what_they_are(url: str) -> None:
    """A status, an error in the stream, a stream that ends too soon, one that is nonsense, a connection cut: each has
    its code, what came before is kept, and the others are served."""
    load = beginning_with(1, BUSY, BUSY, ERROR, BROKEN, NONSENSE, HANGS_UP, NO_STREAM, 1)
    async with open_openai(f"{url}/vllm") as target:
        repeat = await run_load(target, load)

    assert [record.error for record in repeat.requests] == [
        None,
        "http_503",
        "http_503",
        "stream_error",
        "broken_stream",
        "stream_error",
        "RemoteProtocolError",
        "SSEError",
        None,
    ]
    assert [record.output_tokens for record in repeat.requests] == [7, 0, 0, 2, 2, 2, 2, 0, 7]
    assert summarize([repeat], Limits()).errors["http_503"] == 2


async def test_a_load_that_is_cancelled_hangs_up(url: str) -> None:
    """The server has none of its streams open any more, and nothing of theirs is left here."""
    load = [msgspec.structs.replace(request, output_tokens=1_000_000) for request in beginning_with(1, 2, 3)]
    async with open_openai(f"{url}/vllm") as target:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(put_on, target, load, concurrency=1, on_end=ignore))
            with anyio.fail_after(10):
                while await num_open(url) != 3:
                    pass
                tasks.cancel_scope.cancel()
    with anyio.fail_after(10):
        while await num_open(url):
            pass


async def test_one_of_several_models_is_named(url: str) -> None:
    """By --openai-model; the error says which there are."""
    async with open_openai(f"{url}/two-models", "small") as target:
        assert (target.model, target.max_model_len) == ("small", None)
    for model, kind in ((None, ConfigError), ("tiny", NotFound)):
        with pytest.raises(kind, match="large, small"):
            async with open_openai(f"{url}/two-models", model):
                pass


@pytest.mark.parametrize(
    ("server", "kind", "message"),
    [
        ("strict", Unsupported, "400 Bad Request: .*supplied: ignore_eos.*refuses what it does not know cannot be measured"),
        ("guarded", PermissionDenied, "401"),
        ("full", ResourceExhausted, "503"),
        ("failing", BackendError, "500"),
        ("no-models", ConfigError, "none"),
        ("nowhere", Unsupported, "404 Not Found: nothing here"),
    ],
)
async def test_a_server_that_cannot_be_measured(url: str, server: str, kind: type[FerrumError], message: str) -> None:
    """It is tried before the load is put on it, and the error says what it answered."""
    with pytest.raises(kind, match=message):
        async with open_openai(f"{url}/{server}"):
            pass


async def test_a_port_where_nobody_listens() -> None:
    """That is ConnectionLost, with the URL."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionLost, match=url):
            async with open_openai(url):
                pass


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://localhost", "http://", "http://a:b", "unix:/a"])
async def test_what_is_no_url(url: str) -> None:
    """The error says how one is written."""
    with pytest.raises(ConfigError, match="is no URL"):
        async with open_openai(url):
            pass
