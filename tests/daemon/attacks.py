"""What a hostile client sends, and how long it keeps the daemon from others."""

import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from ferrum_rt.ipc.framing import MAX_FRAME_BYTES, encode, server_decoder
from ferrum_rt.ipc.messages import Chunks, ClientMessage, Failed, Finished, Hello, Query, Report, ServerMessage

pack = msgspec.msgpack.encode
HELLO = encode(Hello(version=1, client="test"))
_CALL = {"id": "x", "name": "x", "arguments": ""}
_USER = [{"role": "user", "content": "x"}]
_FULL = MAX_FRAME_BYTES - 200


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def _tagged(tag: str, size: int) -> bytes:
    """The start of a map of so many entries, the first being the tag."""
    return bytes([0x80 | size]) + pack("type") + pack(tag)


def submit(request: dict[str, Any], request_id: str = "a", credit: int = 1000) -> bytes:
    """A Submit whose request is not checked by anything on this side."""
    return frame(pack({"type": "submit", "request_id": request_id, "request": request, "credit": credit}))


def _fill(unit: str, num_bytes: int = _FULL) -> str:
    """A JSON array of ``unit``s, of about so many bytes."""
    return "[" + (unit + ",") * (num_bytes // (len(unit) + 1) - 1) + unit + "]"


# Each ends its connection, without a request_id, with invalid_format.
NO_MESSAGES = {
    "a length of 2 GiB": (2**31 - 1).to_bytes(4, "little"),
    "arrays in arrays": frame(b"\x91" * 100_000),
    "arrays in a known key": frame(_tagged("submit", 2) + pack("request") + b"\x91" * _FULL),
    "maps in a known key": frame(_tagged("hello", 2) + pack("trace") + b"\x81\xa1a" * 100_000),
    "arrays in an unknown key": frame(_tagged("goodbye", 2) + pack("nope") + b"\x91" * 100_000),
    "arrays as the type": frame(b"\x82" + pack("type") + b"\x91" * 100_000),
    "arrays as a second type": frame(_tagged("goodbye", 2) + pack("type") + b"\x91" * 100_000),
    "a key of 4 MiB": frame(_tagged("goodbye", 2) + pack("k" * _FULL) + b"\x01"),
    "4 MiB of empty arrays": frame(
        _tagged("submit", 2)
        + pack("request")
        + b"\x81"
        + pack("messages")
        + b"\xdd"
        + (4_000_000).to_bytes(4, "big")
        + b"\x90" * 4_000_000
    ),
    "4 MiB of messages": submit({"messages": [{"role": "x"}] * 500_000}),
}

# Each fails alone.
NO_REQUESTS: dict[str, dict[str, Any]] = {
    "10,000 messages": {"messages": [{"role": "x"}] * 10_000},
    "4 MiB of tool calls": {"messages": [{"role": "x", "tool_calls": [_CALL] * 15}] * 10_000},
    "1,000,000 token ids": {"token_ids": bytes(4_000_000)},
    "1,000,000 allowed token ids": {"text": "x", "sampling": {"allowed_token_ids": bytes(4_000_000)}},
    "64 long stop strings": {"text": "x", "sampling": {"stop": ["x" * 60_000] * 64}},
    "64 long bad words": {"text": "x", "sampling": {"bad_words": ["x" * 60_000] * 64}},
    "tools of empty lists": {"messages": _USER, "tools": _fill("[]")},
    "tools of small objects": {"messages": _USER, "tools": _fill('{"":0}')},
    "tools of numbers": {"messages": _USER, "tools": _fill("0")},
    "tools as large as they may be": {"messages": _USER, "tools": _fill("[]", 2**18)},
    "tools in tools": {"messages": _USER, "tools": "[" * 4_000_000},
    "tools as deep as may be read": {"messages": _USER, "tools": "[" * 2**18},
    "parameters in parameters": {
        "messages": _USER,
        "tools": json.dumps(
            [{"function": {"name": "f", "parameters": {"type": "object", "x": json.loads("[" * 90 + "]" * 90)}}}]
        ),
    },
    "a tool choice of lists": {"messages": _USER, "tools": "[]", "tool_choice": _fill("[]")},
    "a deep schema": {"text": "x", "sampling": {"response_format": ["json_schema", "[" * 2**18]}},
    "a deep and long schema": {"text": "x", "sampling": {"response_format": ["json_schema", "[" * 4_000_000]}},
    "4 MiB of text": {"text": "x" * _FULL},
    "4 MiB of emoji": {"text": "\U0001f600" * (_FULL // 4)},
    "4 MiB of content": {"messages": [{"role": "user", "content": "x" * _FULL}]},
    "NaN for a deadline": {"text": "x", "deadline_s": float("nan")},
    "NaN for a temperature": {"text": "x", "sampling": {"temperature": float("nan")}},
    "many outputs": {"text": "x", "sampling": {"n": 2**63}},
    "many tokens": {"text": "x", "sampling": {"max_tokens": 2**64 - 1}},
    "a negative seed": {"text": "x", "sampling": {"seed": -(2**63)}},
    "a priority that is none": {"text": "x", "priority": 4},
    "control characters for a client_id": {"text": "x", "client_id": "a\n\x1b[2J"},
    "a bias on no token": {"text": "x", "sampling": {"logit_bias": {2**64 - 1: 1.0}}},
}


class RawClient:
    """A blocking connection, for a thread of its own."""

    def __init__(self, path: Path, *, uid: int | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self._decoder = server_decoder()
        self.heard: list[ServerMessage] = []
        if uid is None:
            self.socket.connect(str(path))
        else:
            connect_as(self.socket, path, uid)
        self.socket.settimeout(20)

    def say(self, *messages: ClientMessage) -> None:
        self.socket.sendall(b"".join(map(encode, messages)))

    def hear(self) -> bool:
        """What comes next; False at the end."""
        with suppress(ConnectionResetError):
            if data := self.socket.recv(1 << 18):
                self.heard.extend(self._decoder.feed(data))
                return True
        return False

    def hear_end(self, request_id: str = "") -> Failed | Finished:
        """Listen until this request, or with none the connection, has ended."""
        while True:
            for message in self.heard:
                if isinstance(message, Failed | Finished) and message.request_id == request_id:
                    return message
            assert self.hear(), f"the end came first, after {self.heard[-3:]}"

    def hear_all(self) -> list[ServerMessage]:
        while self.hear():
            pass
        return self.heard

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()


def connect_as(client: socket.socket, path: Path, uid: int) -> None:
    """Connect as another user, which is noted for good; only root can. No other task runs meanwhile."""
    os.seteuid(uid)
    try:
        client.connect(str(path))
    finally:
        os.seteuid(0)


async def longest_wait(path: Path, attack: Callable[[], None]) -> float:
    """Seconds that the slowest answer to another connection took, while ``attack`` ran in a thread."""
    worst = 0.0

    async def ask() -> None:
        nonlocal worst
        async with await anyio.connect_unix(path) as stream:
            await stream.send(HELLO)
            decoder = server_decoder()
            while True:
                began = time.perf_counter()
                await stream.send(encode(Query(query_id=0, kind="health")))
                while not any(isinstance(message, Report) for message in decoder.feed(await stream.receive())):
                    pass
                worst = max(worst, time.perf_counter() - began)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.to_thread.run_sync(attack)
        tasks.cancel_scope.cancel()
    return worst


async def gaps_of_a_stream(path: Path, request: bytes, attack: Callable[[], None]) -> list[float]:
    """Seconds between the chunks of a request while ``attack`` ran in a thread; the request must go on for as long."""
    times: list[float] = []
    has_begun = anyio.Event()

    async def stream_on() -> None:
        async with await anyio.connect_unix(path) as stream:
            await stream.send(HELLO + request)
            decoder = server_decoder()
            while True:
                for message in decoder.feed(await stream.receive()):
                    assert not isinstance(message, Failed), message
                    if isinstance(message, Chunks):
                        times.append(time.perf_counter())
                        has_begun.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream_on)
        await has_begun.wait()
        await anyio.to_thread.run_sync(attack)
        tasks.cancel_scope.cancel()
    return [after - before for before, after in itertools.pairwise(times)]


class Process:
    """What the kernel says of another process."""

    def __init__(self, pid: int) -> None:
        self._directory = Path(f"/proc/{pid}")

    @property
    def num_descriptors(self) -> int:
        return len(list((self._directory / "fd").iterdir()))

    @property
    def num_threads(self) -> int:
        return len(list((self._directory / "task").iterdir()))

    @property
    def cpu_s(self) -> float:
        fields = (self._directory / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        return self._mib("VmRSS")

    def peak_mib(self) -> float:
        """Since ``reset_peak``."""
        return self._mib("VmHWM")

    def reset_peak(self) -> None:
        (self._directory / "clear_refs").write_text("5")

    def _mib(self, name: str) -> float:
        lines = (self._directory / "status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
