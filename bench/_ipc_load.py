"""The load: so many connections with so many streams each, read as cheaply as it goes, and what the server did meanwhile.

``python -m bench._ipc_load OPTIONS`` is the engine in-process with its readers: for each line on its standard input, the
number of streams and of tokens as JSON, it writes a line with what it measured.
"""

import asyncio
import json
import os
import socket
import sys
import time
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any, NamedTuple

import anyio
import uvloop
import zmq

from bench._ipc_peers import Ask, grpc_channel, grpc_method, infer_stream, zmq_dealer, zmq_frames
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.ipc.client import CREDIT
from ferrum_rt.ipc.convert import to_wire
from ferrum_rt.ipc.framing import encode, server_decoder
from ferrum_rt.ipc.messages import VERSION, Chunks, Credit, Failed, Finished, Hello, ServerMessage, Submit
from ferrum_rt.runtime.runtime import Runtime
from tests.runtime.engines import fake_engine

PROMPT = "sixteen letters."
_RAMP_STEPS = 8


def cpu_s(pid: int) -> float:
    """Processor time that a process has taken in all its threads, as the kernel accounts it: by nanoseconds, not ticks."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid() of the C library does on Linux


class Load(NamedTuple):
    """So many connections, so many streams at once on each, so many steps of them all to measure."""

    clients: int
    streams: int
    steps: int

    @property
    def num_streams(self) -> int:
        return self.clients * self.streams

    @property
    def tokens(self) -> int:
        """Of each stream; they do not all begin in one step."""
        return _RAMP_STEPS + self.steps


class Sample(NamedTuple):
    """Of the steps measured: the server's processor time per token in microseconds, seconds of wall time per step, and the
    shares of a core that the server and the load took."""

    us_per_token: float
    step_s: float
    server_share: float
    load_share: float


class Window:
    """The steady state: whole steps from when every stream has had its first token, as many as wanted or until the first one
    ends."""

    def __init__(self, pid: int, load: Load) -> None:
        self._pid, self._load = pid, load
        self._num_waiting, self._num_read, self._num_steps = load.num_streams, 0, 0
        self._has_ended = False
        self._step_end = 0
        self._begin = self._end = (0.0, 0.0, 0.0)

    def read(self, count: int) -> int:
        """A stream that had ``count`` tokens has one more. Returns how many."""
        self._num_read += 1
        if not count:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._begin, self._step_end = self._now(), self._num_read + self._load.num_streams
        elif count + 1 == self._load.tokens:
            self._has_ended = True
        elif self._num_read == self._step_end and self._num_steps < self._load.steps and not self._has_ended:
            self._end, self._step_end = self._now(), self._num_read + self._load.num_streams
            self._num_steps += 1
        return count + 1

    def sample(self) -> Sample:
        if self._num_steps < self._load.steps / 2:
            raise RuntimeError(f"all streams had only {self._num_steps} steps in common; use a machine that is less busy")
        server, load, wall = (after - before for before, after in zip(self._begin, self._end, strict=True))
        tokens = self._num_steps * self._load.num_streams
        return Sample(1e6 * server / tokens, wall / self._num_steps, server / wall, load / wall)

    def _now(self) -> tuple[float, float, float]:
        return cpu_s(self._pid), time.process_time(), time.perf_counter()


# -- ours -----------------------------------------------------------------------------------------------------------------


class _Reader(asyncio.Protocol):
    """Frames alone, with the credit that our client would give. ``done`` is settled when every stream has ended."""

    def __init__(self, window: Window, load: Load) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._window, self._tokens = window, load.tokens
        self._counts = {str(number): 0 for number in range(load.streams)}
        self._left = load.streams
        self._decoder = server_decoder()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(encode(Hello(version=VERSION)))

    def start(self) -> None:
        request = to_wire(build_request(PROMPT, {"max_tokens": self._tokens, "ignore_eos": True, "temperature": 0.0}))
        messages = [Submit(request_id=number, request=request, credit=CREDIT) for number in self._counts]
        self._transport.write(b"".join(map(encode, messages)))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._decoder.feed(data):
                self._handle(message)
        except RuntimeError as error:  # for whoever waits
            self.done.set_exception(error)
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError("the daemon hung up"))

    def _handle(self, message: ServerMessage) -> None:
        match message:
            case Chunks():
                counts = self._counts
                for chunk in message.chunks:
                    count = counts[chunk.request_id] = self._window.read(counts[chunk.request_id])
                    if count % (CREDIT // 2) == 0 and count < self._tokens:
                        self._transport.write(encode(Credit(request_id=chunk.request_id, chunks=CREDIT // 2)))
            case Finished():
                self._left -= 1
                if not self._left:
                    self.done.set_result(None)
            case Failed():
                raise RuntimeError(message.message)


async def load_daemon(path: str, pid: int, load: Load) -> Sample:
    window = Window(pid, load)
    loop = asyncio.get_running_loop()
    connected = []
    for _ in range(load.clients):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)  # blocks while as many are waiting to be taken in as may
        connected.append(await loop.create_unix_connection(lambda: _Reader(window, load), sock=connection))
    for _, reader in connected:
        reader.start()
    try:
        for _, reader in connected:
            await reader.done
    finally:
        for transport, _ in connected:
            transport.close()
    return window.sample()


# -- the others -----------------------------------------------------------------------------------------------------------


async def load_grpc(path: str, pid: int, load: Load) -> Sample:
    """Its messages are not decoded."""
    window = Window(pid, load)

    async def read(channel: Any) -> None:
        count = 0
        async for _ in grpc_method(channel, decodes=False)(Ask(PROMPT, load.tokens)):
            count = window.read(count)

    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc_channel(path)) for _ in range(load.clients)]
        for channel in channels:
            await channel.channel_ready()
        async with anyio.create_task_group() as readers:
            for channel in channels * load.streams:
                readers.start_soon(read, channel)
    return window.sample()


async def load_zmq(path: str, pid: int, load: Load) -> Sample:
    """Its messages are not decoded. It does not await: libzmq's own poll is the cheapest, and nothing else has to run."""
    window = Window(pid, load)
    with zmq.Context() as context, ExitStack() as stack:
        poller = zmq.Poller()
        counts: dict[tuple[Any, bytes], int] = {}
        for dealer in [stack.enter_context(zmq_dealer(context, path)) for _ in range(load.clients)]:
            poller.register(dealer, zmq.POLLIN)
            for number in range(load.streams):
                frames = zmq_frames(number, Ask(PROMPT, load.tokens))
                dealer.send_multipart(frames)
                counts[dealer, frames[0]] = 0
        left = len(counts)
        while left:
            for dealer, _ in poller.poll():
                with suppress(zmq.Again):
                    while True:
                        stream = dealer, dealer.recv_multipart(zmq.NOBLOCK)[0]
                        counts[stream] = window.read(counts[stream])
                        left -= counts[stream] == load.tokens
    return window.sample()


async def load_in_process(engine: Runtime, load: Load) -> Sample:
    """Here the load is a part of the server."""
    window = Window(os.getpid(), load)

    async def read() -> None:
        count = 0
        async with infer_stream(engine, Ask(PROMPT, load.tokens)) as chunks:
            async for _ in chunks:
                count = window.read(count)

    async with anyio.create_task_group() as readers:
        for _ in range(load.num_streams):
            readers.start_soon(read)
    return window.sample()


async def _main(config: dict[str, Any], fake: dict[str, Any]) -> None:
    async with fake_engine(config, **fake) as (engine, _):
        print("ready", flush=True)
        for line in sys.stdin:  # blocks the loop, which has nothing to do meanwhile
            print(json.dumps(await load_in_process(engine, Load(*json.loads(line)))), flush=True)


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    uvloop.run(_main(options.pop("config", {}), options))
