"""A client of the daemon made of a socket and msgpack alone, as docs/protocol.md describes it.

    python examples/plain_client.py PROMPT [--socket PATH] [--max-tokens N] [--seed S] [--temperature T] [--chat] [--status]

It imports nothing of ferrum_rt: read it as the plan of a client in another language. One thread, which waits for whatever
comes first, a message or Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

import msgpack

VERSION = 1
MAX_FRAME_BYTES = 4 * 1024 * 1024
LENGTH = struct.Struct("<I")
# As many chunks as we are ready to hold unread. Half of them are given back at a time, so the daemon never waits for us.
WINDOW = 32

Message = dict[str, Any]


class Failed(Exception):
    """What a ``failed`` says of a request, or of the whole connection. Programs look at ``code``, people at the message."""

    def __init__(self, message: Message) -> None:
        super().__init__(message["message"])
        self.code: str = message["code"]


class Full(Failed):
    """The daemon takes no more just now. The same request may succeed in ``retry_after`` seconds."""

    def __init__(self, message: Message) -> None:
        super().__init__(message)
        self.retry_after: float = message.get("retry_after", 1.0)


class Cancelled(Failed):
    """We cancelled it, or the daemon did, which is shutting down."""


class ConnectionLost(Exception):
    """The daemon went away. What became of the request cannot be known; the text that came before is good."""


class Interrupted(Exception):
    """Ctrl-C."""


# The codes after which this program does something of its own. Any other is Failed; new ones may come.
ERRORS = {"resource_exhausted": Full, "cancelled": Cancelled}


def error_of(message: Message) -> Failed:
    return ERRORS.get(message["code"], Failed)(message)


class Connection:
    """Frames to and from the daemon, and what concerns all of the connection: hello, its failure, the daemon's leave."""

    def __init__(self, path: str, ctrl_c: int) -> None:
        self._ctrl_c = ctrl_c
        self._unread = bytearray()
        self._frame_bytes = MAX_FRAME_BYTES
        self.is_going_away = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:  # nobody is there, or the socket is not for us
            raise ConnectionLost(f"{path}: {error.strerror}; is a daemon running there?") from error
        self.send("hello", version=VERSION, client="plain_client.py")
        welcome = self.receive()
        self._frame_bytes = welcome["limits"]["frame_bytes"]

    def send(self, message_type: str, **fields: Any) -> None:
        """Fields at their default are simply not given."""
        # A dict keeps its order, so that "type" comes first, as it must. Where maps have no order, write the key yourself.
        frame = msgpack.packb({"type": message_type, **fields})
        if len(frame) > self._frame_bytes:
            raise ValueError(f"{message_type}: {len(frame)} bytes; the daemon takes {self._frame_bytes}")
        # If the daemon has hung up, its reason may still lie in the socket: it is receive that tells.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(LENGTH.pack(len(frame)) + frame)

    def receive(self) -> Message:
        """The next message that concerns a request or a query. Raises Interrupted between messages, never within one."""
        while True:
            message: Message = msgpack.unpackb(self._frame())
            if message["type"] == "going_away":
                # Requests that are under way go on for drain_s seconds, so we read on, but begin nothing new.
                self.is_going_away = True
                print(f"[the daemon is going away: {message['reason']}]", file=sys.stderr)
            elif message["type"] == "failed" and "request_id" not in message:
                raise error_of(message)
            else:
                return message

    def _frame(self) -> bytes:
        self._read_until(LENGTH.size)
        (length,) = LENGTH.unpack_from(self._unread)
        if length > MAX_FRAME_BYTES:
            raise ConnectionLost(f"a frame of {length} bytes was announced: this is no daemon of protocol version {VERSION}")
        self._read_until(LENGTH.size + length)
        frame = bytes(self._unread[LENGTH.size : LENGTH.size + length])
        del self._unread[: LENGTH.size + length]
        return frame

    def _read_until(self, size: int) -> None:
        """Until so many bytes are there. What was read is kept when Ctrl-C comes in between."""
        while len(self._unread) < size:
            readable, _, _ = select.select([self._socket.fileno(), self._ctrl_c], [], [])
            if self._ctrl_c in readable:
                os.read(self._ctrl_c, 1)
                raise Interrupted
            try:
                data = self._socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise ConnectionLost("the daemon closed the connection")
            self._unread += data

    def close(self) -> None:
        """The daemon cancels what is still under way, with a goodbye or without."""
        self.send("goodbye")
        self._socket.close()


def stream(connection: Connection, request: Message) -> Iterator[Message]:
    """The chunks of a request's answer, to be read to their end. Raises Failed where there is none."""
    if connection.is_going_away:
        raise ConnectionLost("the daemon is going away and takes no new requests; connect again later")
    request_id = "1"  # any name that no other request of this connection has while it is under way
    connection.send("submit", request_id=request_id, request=request, credit=WINDOW)
    unpaid = 0
    while True:
        try:
            message = connection.receive()
        except Interrupted:
            # Then it fails as cancelled, or has just finished; either way its last message is still to come.
            connection.send("cancel", request_id=request_id)
            continue
        if message["type"] == "chunks":
            for chunk in message["chunks"]:  # of all our requests: with more than one, sort them by their request_id
                yield chunk
                unpaid += 1
            # Paid once it has been used. Had we been slower, the daemon would have parked the request, nobody else's.
            if unpaid >= WINDOW // 2:
                connection.send("credit", request_id=request_id, chunks=unpaid)
                unpaid = 0
        elif message["type"] == "finished":
            return
        elif message["type"] == "failed":
            raise error_of(message)


def report(connection: Connection, kind: str) -> Message:
    """The answer to a query: ``status``, ``metrics`` or ``health``."""
    query_id = 1
    connection.send("query", query_id=query_id, kind=kind)
    while True:
        message = connection.receive()
        if message["type"] == "report" and message["query_id"] == query_id:
            content: Message = json.loads(message["content"])
            return content


def print_answer(connection: Connection, request: Message) -> None:
    chunk: Message = {}
    try:
        for chunk in stream(connection, request):
            print(chunk.get("text", ""), end="", flush=True)  # like any field at its default, an empty text is left out
    finally:
        print()
    usage = chunk["usage"]  # it comes with an output's last chunk
    print(f"-- {usage['completion_tokens']} tokens, ended by {chunk['finish_reason']}; the seed was {chunk['seed']}")


def when_ctrl_c() -> int:
    """A pipe's end with something to read once Ctrl-C was pressed. A second one ends the program where it stands."""
    readable, writable = os.pipe()

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(writable, b"c")

    signal.signal(signal.SIGINT, handle)
    return readable


def request_of(options: argparse.Namespace) -> Message:
    given = {"max_tokens": options.max_tokens, "seed": options.seed, "temperature": options.temperature}
    sampling = {name: value for name, value in given.items() if value is not None}
    if options.chat:
        return {"messages": [{"role": "user", "content": options.prompt}], "sampling": sampling}
    return {"text": options.prompt, "sampling": sampling}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a ferrum_rt daemon.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT")
    parser.add_argument("--socket", default=f"{os.environ.get('XDG_RUNTIME_DIR')}/ferrum-rt/default.sock", metavar="PATH")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--seed", type=int, metavar="S")
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's turn in a chat, not the text to go on with")
    parser.add_argument("--status", action="store_true", help="print the daemon's status first; then PROMPT may be left out")
    options = parser.parse_args()
    if options.prompt is None and not options.status:
        parser.error("give a PROMPT, or --status")
    return options


def main() -> int:
    options = parse_options()
    try:
        with contextlib.closing(Connection(options.socket, when_ctrl_c())) as connection:
            if options.status:
                print(json.dumps(report(connection, "status"), indent=2))
            if options.prompt is not None:
                print_answer(connection, request_of(options))
    except Interrupted:
        return 130
    except Cancelled as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 130
    except Full as error:
        print(f"{error.code}: {error}; try again in {error.retry_after:.1f} s", file=sys.stderr)
        return 75
    except Failed as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    except ConnectionLost as error:
        print(f"connection_lost: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
