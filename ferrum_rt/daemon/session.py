"""One connection of the daemon: what it may do, what it has under way, and what is on its way to it.

Everything here is synchronous and runs on the event loop: messages are handled as their bytes come, and the chunks that one
step brings for a connection leave in one frame, written once.
"""

import asyncio
import itertools
from collections.abc import Callable
from typing import cast

import msgspec

from ferrum_rt.interfaces.errors import (
    Cancelled,
    FerrumError,
    InvalidFormat,
    PermissionDenied,
    ResourceExhausted,
    Unsupported,
)
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import StreamChunk
from ferrum_rt.ipc.convert import chunk_to_wire, from_wire
from ferrum_rt.ipc.framing import MAX_FRAME_BYTES, client_decoder, encode
from ferrum_rt.ipc.messages import (
    VERSION,
    Accepted,
    Cancel,
    Chunks,
    ClientMessage,
    Credit,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Limits,
    Query,
    Report,
    ServerMessage,
    Submit,
    Welcome,
    WireChunk,
)
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.runtime import Runtime

HELLO_LIMIT_S = 5.0
CLOSE_LIMIT_S = 5.0
MAX_CREDIT = 1_000_000

_numbers = itertools.count(1)


class SessionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one connection: bytes in a frame, requests at once, and bytes that may wait for it to read."""

    frame_bytes: int = MAX_FRAME_BYTES
    requests: int = 256
    output_bytes: int = 16 * 1024 * 1024


class _WireSink:
    """The ChunkSink of one request: its room is the client's credit."""

    def __init__(self, session: "Session", request_id: str, credit: int) -> None:
        self.generation: Generation | None = None
        self.credit = credit
        self._session, self._request_id = session, request_id
        self._error: FerrumError | None = None

    @property
    def is_full(self) -> bool:
        return self.credit <= 0

    def put(self, item: StreamChunk | FerrumError) -> None:
        if isinstance(item, FerrumError):
            self._error = item
        else:
            self.credit -= 1
            self._session.send_chunk(chunk_to_wire(item, self._request_id))

    def cancel(self, error: FerrumError) -> None:
        """End the request, if it has not ended; the client is told why."""
        generation = self.generation
        if generation is not None and not generation.is_finished:
            self._error = error
            self._session.engine.abandon(generation)

    def close(self) -> None:
        assert self.generation is not None  # only an admitted request is closed
        if self._error is not None:
            self._session.end(self._request_id, failure(self._error, self._request_id))
            return
        metrics = self.generation.metrics()
        self._session.end(
            self._request_id,
            Finished(
                request_id=self._request_id,
                queue_s=metrics.queue_s,
                ttft_s=metrics.ttft_s,
                total_s=metrics.total_s,
            ),
        )


def failure(error: FerrumError, request_id: str = "") -> Failed:
    """The message for an error."""
    retry_after = error.retry_after if isinstance(error, ResourceExhausted) else None
    return Failed(request_id=request_id, code=error.code, message=str(error), retry_after=retry_after)


class Session(asyncio.Protocol):
    """``identify`` says whose connection it is, before a byte is read; it raises PermissionDenied for one that may not be.
    Prefixes are shared among one owner's requests alone. ``on_lost`` is called once, when the connection is gone."""

    def __init__(
        self,
        engine: Runtime,
        identify: Callable[[asyncio.BaseTransport], str],
        limits: SessionLimits,
        on_lost: Callable[["Session"], None],
    ) -> None:
        self.engine = engine
        self._identify, self._limits, self._on_lost = identify, limits, on_lost
        self._owner = ""
        self._number = next(_numbers)
        self._decoder = client_decoder(limits.frame_bytes)
        self._sinks: dict[str, _WireSink] = {}
        self._chunks: list[WireChunk] = []
        self._messages: list[ServerMessage] = []
        self._is_flush_due = False
        self._is_greeted = False
        self._is_closing = False
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle

    # -- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(HELLO_LIMIT_S, self._refuse_silence)
        try:
            self._owner = self._identify(transport)
        except PermissionDenied as error:
            self.cut(error)

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        try:
            for message in self._decoder.feed(data):
                self._handle(message)
                if self._is_closing:
                    return
        except FerrumError as error:
            self.cut(error)

    def eof_received(self) -> bool:
        """Who has nothing more to say cannot give credit either: it is gone."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._is_closing = True
        self._timer.cancel()
        self._cancel_all(Cancelled("the client is gone"))
        self._on_lost(self)

    def cut(self, error: FerrumError) -> None:
        """Say why, and close; what the client does not read within a time it never will."""
        if self._is_closing:
            return
        self._is_closing = True
        self._timer.cancel()
        self._cancel_all(error)
        self._messages.append(failure(error))
        self._transport.write(self._take_frames())
        self._transport.close()
        self._timer = self._loop.call_later(CLOSE_LIMIT_S, self._transport.abort)

    def _refuse_silence(self) -> None:
        self.cut(InvalidFormat(f"no hello came within {HELLO_LIMIT_S:g} s"))

    def _cancel_all(self, error: FerrumError) -> None:
        for sink in list(self._sinks.values()):
            sink.cancel(error)

    # -- messages in --------------------------------------------------------------------------------------------------

    def _handle(self, message: ClientMessage) -> None:
        if self._is_greeted is isinstance(message, Hello):
            raise InvalidFormat("the first message must be hello, and no other")
        match message:
            case Hello():
                self._greet(message)
            case Submit():
                self._submit(message)
            case Credit():
                self._give_credit(message)
            case Cancel():
                if (sink := self._sinks.get(message.request_id)) is not None:
                    sink.cancel(Cancelled("cancelled by the client"))
            case Query():
                self._answer(message)
            case Goodbye():
                self._cancel_all(Cancelled("the client has said goodbye"))
                self._is_closing = True
                self._transport.close()

    def _greet(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise Unsupported(f"version {hello.version} of the protocol is not spoken here; {VERSION} is")
        self._is_greeted = True
        self._timer.cancel()
        self._send(
            Welcome(
                version=VERSION,
                model=self.engine.model_info.id,
                limits=Limits(frame_bytes=self._limits.frame_bytes, requests=self._limits.requests),
                config=msgspec.json.encode(self.engine.config).decode(),
            )
        )

    def _submit(self, message: Submit) -> None:
        request_id = message.request_id
        if request_id in self._sinks:
            raise InvalidFormat(f"request_id {request_id!r} is under way already in this connection")
        sink = _WireSink(self, request_id, min(message.credit, MAX_CREDIT))
        try:
            if len(self._sinks) >= self._limits.requests:
                raise ResourceExhausted(f"this connection has {len(self._sinks)} requests under way, which is all it may")
            prompt, fields = from_wire(message.request)
            fields["client_id"] = f"{self._owner}/{fields['client_id']}"
            request = build_request(prompt, fields | {"id": f"{self._number}/{request_id}"})
            sink.generation = self.engine.start(request, sink)
        except FerrumError as error:
            self._send(failure(error, request_id))
        else:
            self._sinks[request_id] = sink
            self._send(Accepted(request_id=request_id))

    def _give_credit(self, message: Credit) -> None:
        if message.chunks < 0:
            raise InvalidFormat(f"credit of {message.chunks} chunks was given")
        sink = self._sinks.get(message.request_id)
        if sink is not None and sink.generation is not None:  # else it has ended meanwhile
            sink.credit = min(sink.credit + message.chunks, MAX_CREDIT)
            if not sink.is_full:
                self.engine.resume(sink.generation)

    def _answer(self, query: Query) -> None:
        content: msgspec.Struct
        match query.kind:
            case "metrics":
                content = self.engine.metrics()
            case "status":
                content = self.engine.status_now()
            case "health":
                content = self.engine.health_now()
        self._send(Report(query_id=query.query_id, content=msgspec.json.encode(content).decode()))

    # -- messages out -------------------------------------------------------------------------------------------------

    def send_chunk(self, chunk: WireChunk) -> None:
        """With what else the step brings."""
        self._chunks.append(chunk)
        self._flush_soon()

    def end(self, request_id: str, message: Finished | Failed) -> None:
        """A request's last message, behind its chunks."""
        del self._sinks[request_id]
        self._send(message)

    def _send(self, message: ServerMessage) -> None:
        self._messages.append(message)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._is_flush_due and not self._is_closing:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._is_closing:
            return
        try:
            self._transport.write(self._take_frames())
        except FerrumError as error:  # more than a frame takes
            self.cut(error)
            return
        waiting = self._transport.get_write_buffer_size()
        if waiting > self._limits.output_bytes:
            self.cut(ResourceExhausted(f"{waiting} bytes wait for this client to read them, which is more than may"))

    def _take_frames(self) -> bytes:
        """Chunks first: the messages behind them may be their requests' last."""
        chunks, messages = self._chunks, self._messages
        self._chunks, self._messages = [], []
        frames = [encode(Chunks(chunks=chunks))] if chunks else []
        frames.extend(map(encode, messages))
        return b"".join(frames)
