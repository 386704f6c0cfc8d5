"""The peers that the daemon is measured beside: the same fake engine behind grpc.aio and behind zmq.asyncio.

Each server runs in a process of its own, ``python -m bench._ipc_peers NAME SOCKET OPTIONS`` with the OPTIONS that
tests/fakes/daemon.py takes (``bare SOCKET`` and ``least SOCKET`` have none), and writes a line when it is ready. The peers
are as small as they can be, which favours them: no limits, no flow control, no check of who connects, and no cancellation
but what the library brings by itself. What travels is encoded by msgspec on both sides, so gRPC needs no protobuf classes.
Everything runs on uvloop.
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, cast

import anyio
import grpc.aio
import msgspec
import uvloop
import zmq
import zmq.asyncio

from ferrum_rt.interfaces.types import RequestId, StreamChunk, TokenId
from ferrum_rt.ipc.framing import client_decoder, encode, server_decoder
from ferrum_rt.ipc.messages import Chunks, Submit
from ferrum_rt.runtime.runtime import Runtime
from tests.runtime.engines import fake_engine

_SERVICE, _METHOD = "bench.Engine", "Infer"


class Ask(msgspec.Struct):
    """A request: less than ours can say."""

    prompt: str
    max_tokens: int


_ENCODER = msgspec.msgpack.Encoder()
_ASKS = msgspec.msgpack.Decoder(Ask)
_CHUNKS = msgspec.msgpack.Decoder(StreamChunk)


def infer_stream(engine: Runtime, ask: Ask) -> AbstractAsyncContextManager[AsyncIterator[StreamChunk]]:
    return engine.infer_stream(ask.prompt, max_tokens=ask.max_tokens, ignore_eos=True, temperature=0.0)


# -- grpc.aio -------------------------------------------------------------------------------------------------------------


async def serve_grpc(engine: Runtime, path: str) -> None:
    async def infer(ask: Ask, context: Any) -> AsyncIterator[StreamChunk]:
        async with infer_stream(engine, ask) as chunks:
            async for chunk in chunks:
                yield chunk

    handler = grpc.unary_stream_rpc_method_handler(
        infer, request_deserializer=_ASKS.decode, response_serializer=_ENCODER.encode
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


def grpc_channel(path: str) -> Any:
    """A connection of its own; gRPC would put all channels to one address on one."""
    return grpc.aio.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)])


def grpc_method(channel: Any, *, decodes: bool = True) -> Any:
    """Call it with an Ask, and iterate over what it returns: StreamChunks, or the bytes that they travel as."""
    return channel.unary_stream(
        f"/{_SERVICE}/{_METHOD}",
        request_serializer=_ENCODER.encode,
        response_deserializer=_CHUNKS.decode if decodes else None,
    )


# -- zmq.asyncio ----------------------------------------------------------------------------------------------------------


async def serve_zmq(engine: Runtime, path: str) -> None:
    """Messages are (client,) number of the request, body."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as router:
        router.set_hwm(0)  # else a ROUTER drops what a client does not read in time
        router.bind(f"ipc://{path}")
        print("ready", flush=True)

        async def infer(client: bytes, number: bytes, ask: Ask) -> None:
            async with infer_stream(engine, ask) as chunks:
                async for chunk in chunks:
                    await router.send_multipart([client, number, _ENCODER.encode(chunk)])

        async with anyio.create_task_group() as requests:
            while True:
                client, number, body = await router.recv_multipart()
                requests.start_soon(infer, client, number, _ASKS.decode(body))


@contextmanager
def zmq_dealer(context: Any, path: str) -> Iterator[Any]:
    """A connection."""
    with context.socket(zmq.DEALER) as dealer:
        dealer.set_hwm(0)
        dealer.linger = 0
        dealer.connect(f"ipc://{path}")
        yield dealer


def zmq_frames(number: int, ask: Ask) -> list[bytes]:
    return [str(number).encode(), _ENCODER.encode(ask)]


@asynccontextmanager
async def zmq_stream(dealer: Any, ask: Ask) -> AsyncIterator[AsyncIterator[StreamChunk]]:
    """One request at a time."""

    async def chunks() -> AsyncIterator[StreamChunk]:
        is_last = False
        while not is_last:
            _, body = await dealer.recv_multipart()
            chunk = _CHUNKS.decode(body)
            is_last = chunk.finish_reason is not None
            yield chunk

    await dealer.send_multipart(zmq_frames(0, ask))
    yield chunks()


# -- the floors -----------------------------------------------------------------------------------------------------------


def serve_bare(path: str) -> None:
    """Sends back what it gets: two processes, a blocking socket, and nothing else."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)


class LeastServer(asyncio.Protocol):
    """Answers each Submit at once with one chunk."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._decoder = client_decoder()

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            assert isinstance(message, Submit)
            chunk = StreamChunk(request_id=RequestId(message.request_id), text="x", token_ids=[TokenId(1)])
            self._transport.write(encode(Chunks(chunks=[chunk])))


class LeastClient(asyncio.Protocol):
    """One request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)
        self._decoder = server_decoder()

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._answer.set_result(message)

    async def ask(self, submit: Submit) -> None:
        """Until the chunk is here."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(encode(submit))
        await self._answer


async def serve_least(path: str) -> None:
    """The protocol's messages and two event loops: no engine, no checks, no flow control."""
    server = await asyncio.get_running_loop().create_unix_server(LeastServer, path)
    print("ready", flush=True)
    await server.serve_forever()


async def _main(kind: str, path: str, config: dict[str, Any], fake: dict[str, Any]) -> None:
    async with fake_engine(config, **fake) as (engine, _):
        await {"grpc.aio": serve_grpc, "zmq.asyncio": serve_zmq}[kind](engine, path)


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        serve_bare(sys.argv[2])
    elif sys.argv[1] == "least":
        uvloop.run(serve_least(sys.argv[2]))
    else:
        options = json.loads(sys.argv[3])
        uvloop.run(_main(sys.argv[1], sys.argv[2], options.pop("config", {}), options))
