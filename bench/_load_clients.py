"""The clients of bench.daemon_load: ``python -m bench._load_clients KIND SOCKET CONNECTIONS STREAMS``.

Each kind is a process of its own. They speak in frames, and without an event loop of tasks, so that they are not what is
measured. On standard input come the lines ``begin`` and ``end``, as often as wanted; each is answered by a line of JSON,
that to ``end`` with what was seen since ``begin``. The kinds:

- *healthy* reads at once and gives credit as it reads. Its connections stay when it is told to end: what begins and ends is
  the measurement.
- *slow*: half the connections read nothing at all, and have asked for so much that what the kernel takes for them is full;
  the others read, but give each stream one credit a second.
- *doomed*: each connection dies at a random moment and is followed by another. Half of them are processes, which are
  killed; the others hang up with a message half sent and with output that they have not read, so that the daemon sees a
  reset.
"""

import argparse
import gc
import heapq
import itertools
import json
import os
import random
import select
import signal
import socket
import string
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from bench._common import quantile
from ferrum_rt.ipc.framing import encode, server_decoder
from ferrum_rt.ipc.messages import (
    VERSION,
    Chunks,
    ClientMessage,
    Credit,
    Failed,
    Finished,
    Hello,
    Query,
    Submit,
    WireRequest,
    WireSampling,
)

PROMPT_CHARACTERS = 32
OUTPUT_TOKENS = (128, 256)
CREDIT = 64
ALL_CREDIT = 1_000_000
LIFE_S = (0.2, 2.0)
# What fills the kernel's buffer of an unread connection within a second, and costs the daemon little.
QUERIES = 1500
_RECEIVE_BYTES = 262_144


class Loop:
    """Sockets that are watched, and what is due at some time."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def watch(self, fd: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call ``handler`` whenever there is something to read, or with no ``events`` when the other side has hung up."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def forget(self, fd: int) -> None:
        del self._handlers[fd]
        self._poll.unregister(fd)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))

    def clear_due(self) -> None:
        self._due.clear()

    def run(self) -> None:
        """Until a handler raises."""
        while True:
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for fd, _ in self._poll.poll(timeout):
                if (handler := self._handlers.get(fd)) is not None:
                    handler()
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()


class Healthy:
    """``num_connections`` connections with ``num_streams`` streams each; one that has ended is followed by another."""

    def __init__(self, loop: Loop, path: str, num_connections: int, num_streams: int) -> None:
        self.gaps = array("d")
        self.is_measured = False
        self.num_failed = 0
        self._began = (0.0, 0.0)
        for _ in range(num_connections):
            reader = _Reader(self, path, num_streams)
            loop.watch(reader.socket.fileno(), reader.read)

    def begin(self) -> None:
        self.gaps, self.num_failed = array("d"), 0
        self._began = time.monotonic(), time.process_time()
        self.is_measured = True

    def end(self) -> dict[str, Any]:
        self.is_measured = False
        wall, cpu = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "longest": 1.0}
        seen = {name: quantile(self.gaps, share) for name, share in shares.items()}
        return {"num_gaps": len(self.gaps), "num_failed": self.num_failed, "cpu_share": cpu / wall, **seen}


class _Reader:
    def __init__(self, owner: Healthy, path: str, num_streams: int) -> None:
        self.socket = _connect(path)
        self._owner = owner
        self._decoder = server_decoder()
        self._names = itertools.count()
        self._arrivals: dict[str, float] = {}
        self._unpaid: dict[str, int] = {}
        _say(self.socket, Hello(version=VERSION), *(self._new_stream() for _ in range(num_streams)))

    def read(self) -> None:
        data = self.socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        if not data:
            raise ConnectionError("the daemon has hung up on a healthy connection")
        now = time.monotonic()
        replies: list[ClientMessage] = []
        for message in self._decoder.feed(data):
            match message:
                case Chunks():
                    for chunk in message.chunks:
                        self._arrived(chunk.request_id, now, replies)
                case Finished() | Failed():
                    self._owner.num_failed += isinstance(message, Failed)
                    self._arrivals.pop(message.request_id, None)
                    self._unpaid.pop(message.request_id, None)
                    replies.append(self._new_stream())
        if replies:
            _say(self.socket, *replies)

    def _arrived(self, name: str, now: float, replies: list[ClientMessage]) -> None:
        before = self._arrivals.get(name)
        self._arrivals[name] = now
        if before is not None and self._owner.is_measured:
            self._owner.gaps.append(now - before)
        unpaid = self._unpaid.get(name, 0) + 1
        if unpaid >= CREDIT // 2:
            replies.append(Credit(request_id=name, chunks=unpaid))
            unpaid = 0
        self._unpaid[name] = unpaid

    def _new_stream(self) -> Submit:
        return _ask(str(next(self._names)), CREDIT)


class Slow:
    """Those that read nothing, and come again when they are cut off; and those that give little credit."""

    def __init__(self, loop: Loop, path: str, num_connections: int, num_streams: int) -> None:
        self._loop, self._path, self._num_streams = loop, path, num_streams
        self._num_unread = num_connections // 2
        self._num_grudging = num_connections - self._num_unread
        self._open: set[socket.socket] = set()
        self._num_cut = 0

    def begin(self) -> None:
        self._num_cut = 0
        for _ in range(self._num_unread):
            self._open_unread()
        for _ in range(self._num_grudging):
            self._open_grudging()

    def end(self) -> dict[str, Any]:
        self._loop.clear_due()
        for connection in list(self._open):
            self._close(connection)
        return {"num_cut": self._num_cut}

    def _open_unread(self) -> None:
        connection = self._connect(ALL_CREDIT)
        queries = (Query(query_id=number, kind="health") for number in range(QUERIES))
        with suppress(ConnectionError):  # cut off already
            _say(connection, *queries)
        self._loop.watch(connection.fileno(), lambda: self._was_cut(connection, self._open_unread), events=0)

    def _open_grudging(self) -> None:
        connection = self._connect(1)

        def read() -> None:
            if not _is_open(connection):
                self._was_cut(connection, self._open_grudging)

        def give() -> None:
            if connection in self._open:
                with suppress(ConnectionError):  # ``read`` hears of it
                    _say(connection, *(Credit(request_id=str(name), chunks=1) for name in range(self._num_streams)))
                self._loop.after(1.0, give)

        self._loop.watch(connection.fileno(), read)
        self._loop.after(random.random(), give)

    def _connect(self, credit: int) -> socket.socket:
        connection = _open(self._path, self._num_streams, credit)
        self._open.add(connection)
        return connection

    def _was_cut(self, connection: socket.socket, reopen: Callable[[], None]) -> None:
        self._num_cut += 1
        self._close(connection)
        self._loop.after(0.1, reopen)

    def _close(self, connection: socket.socket) -> None:
        self._loop.forget(connection.fileno())
        self._open.remove(connection)
        connection.close()


class Doomed:
    """Each connection with its streams lives for a random time within ``LIFE_S``."""

    def __init__(self, loop: Loop, path: str, num_connections: int, num_streams: int) -> None:
        self._loop, self._path, self._num_streams = loop, path, num_streams
        self._num_processes = num_connections // 2
        self._num_sockets = num_connections - self._num_processes
        self._processes: set[int] = set()
        self._sockets: set[socket.socket] = set()
        self._num_killed = self._num_reset = 0

    def begin(self) -> None:
        self._num_killed = self._num_reset = 0
        for _ in range(self._num_processes):
            self._start_process()
        for _ in range(self._num_sockets):
            self._start_socket()

    def end(self) -> dict[str, Any]:
        self._loop.clear_due()
        for pid in list(self._processes):
            self._kill(pid)
        for connection in list(self._sockets):
            self._reset(connection)
        return {"num_killed": self._num_killed, "num_reset": self._num_reset}

    def _start_process(self) -> None:
        pid = os.fork()
        if pid == 0:
            self._live()
        self._processes.add(pid)

        def die() -> None:
            self._kill(pid)
            self._start_process()

        self._loop.after(random.uniform(*LIFE_S), die)

    def _live(self) -> None:
        """In the child: read until killed. Nothing of the parent's is kept open, for it would not be closed with it."""
        try:
            os.closerange(0, 1024)
            random.seed()
            connection = _open(self._path, self._num_streams, ALL_CREDIT)
            while connection.recv(_RECEIVE_BYTES):
                pass
        finally:
            os._exit(0)

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._processes.remove(pid)
        self._num_killed += 1

    def _start_socket(self) -> None:
        connection = _open(self._path, self._num_streams, ALL_CREDIT)
        self._sockets.add(connection)

        def die() -> None:
            self._reset(connection)
            self._start_socket()

        self._loop.after(random.uniform(*LIFE_S), die)

    def _reset(self, connection: socket.socket) -> None:
        with suppress(ConnectionError):
            frame = encode(_ask("half", 1))
            connection.send(frame[: len(frame) // 2])
        connection.close()
        self._sockets.remove(connection)
        self._num_reset += 1


def _connect(path: str) -> socket.socket:
    """Blocking, for those who send; who reads asks not to wait."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


def _open(path: str, num_streams: int, credit: int) -> socket.socket:
    connection = _connect(path)
    with suppress(ConnectionError):  # refused
        _say(connection, Hello(version=VERSION), *(_ask(str(name), credit) for name in range(num_streams)))
    return connection


def _say(connection: socket.socket, *messages: ClientMessage) -> None:
    connection.sendall(b"".join(map(encode, messages)))


def _is_open(connection: socket.socket) -> bool:
    """Read what has come, and forget it."""
    try:
        return bool(connection.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT))
    except ConnectionError:
        return False


def _ask(name: str, credit: int) -> Submit:
    text = "".join(random.choices(string.ascii_letters, k=PROMPT_CHARACTERS))
    sampling = WireSampling(max_tokens=random.randint(*OUTPUT_TOKENS), ignore_eos=True, temperature=0.0)
    return Submit(request_id=name, request=WireRequest(text=text, sampling=sampling), credit=credit)


KINDS: dict[str, type[Healthy] | type[Slow] | type[Doomed]] = {"healthy": Healthy, "slow": Slow, "doomed": Doomed}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One kind of the clients of bench.daemon_load.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("socket")
    parser.add_argument("connections", type=int)
    parser.add_argument("streams", type=int, help="of each connection")
    args = parser.parse_args(arguments)
    gc.disable()  # its pauses would count as the daemon's
    loop = Loop()
    clients = KINDS[args.kind](loop, args.socket, args.connections, args.streams)

    def obey() -> None:
        match sys.stdin.readline().strip():
            case "begin":
                clients.begin()
                print("{}", flush=True)
            case "end":
                print(json.dumps(clients.end()), flush=True)
            case _:  # whoever started us has gone
                clients.end()
                raise SystemExit

    loop.watch(sys.stdin.fileno(), obey)
    print("{}", flush=True)  # here we are
    loop.run()


if __name__ == "__main__":
    main()
