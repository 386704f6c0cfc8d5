"""One connection of the daemon: what it may do, what it has under way, and what is on its way to it.

Everything here is synchronous and runs on the event loop: messages are handled as their bytes come, and the chunks that one
step brings for a connection leave in one frame, written once.
"""

import asyncio
import collections
import enum
import itertools
import logging
from collections.abc import Callable
from itertools import islice
from typing import cast

import msgspec
from opentelemetry import context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ferrum_rt.daemon.answers import MAX_FAILURE_LENGTH, answer
from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.outbox import Outbox
from ferrum_rt.daemon.users import Cost, User
from ferrum_rt.interfaces.errors import (
    Cancelled,
    FerrumError,
    InvalidFormat,
    RequestValidationError,
    ResourceExhausted,
    Unsupported,
)
from ferrum_rt.interfaces.requests import build_request, is_token_ids
from ferrum_rt.interfaces.types import InferenceRequest, RequestId, StreamChunk
from ferrum_rt.ipc.convert import from_wire, num_packed
from ferrum_rt.ipc.framing import MAX_FRAME_BYTES, client_decoder, encode
from ferrum_rt.ipc.messages import (
    MAX_MESSAGES,
    VERSION,
    Accepted,
    Cancel,
    Chunks,
    ClientMessage,
    Credit,
    EndSession,
    Failed,
    Finished,
    ForkSession,
    GoingAway,
    Goodbye,
    Hello,
    Limits,
    Query,
    Submit,
    Welcome,
    WireRequest,
)
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.runtime import Runtime

HELLO_LIMIT_S = 5.0
CLOSE_LIMIT_S = 5.0
MAX_CREDIT = 1_000_000
_ACCEPT_WITHIN_S = 0.005
# Messages of one connection that are handled before the others have their turn, unless they come to so many bytes before.
_HANDLE_AT_ONCE = 16
_HANDLE_BYTES = 16 * 1024

_log = logging.getLogger(__name__)
_numbers = itertools.count(1)
_TRACE_CONTEXT = TraceContextTextMapPropagator()


class _State(enum.Enum):
    """Of a connection; it goes down this list, and may leave out."""

    GREETING = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()
    LOST = enum.auto()


class _WireSink:
    """The ChunkSink of one request: its room is the client's credit."""

    def __init__(self, session: "Session", request_id: str, credit: int, cost: Cost) -> None:
        self.generation: Generation | None = None
        self.credit = credit
        self.cost = cost
        self._session, self._request_id = session, request_id
        self._error: FerrumError | None = None

    @property
    def is_full(self) -> bool:
        return self.credit <= 0

    def put(self, item: StreamChunk | FerrumError) -> None:
        if isinstance(item, FerrumError):
            self._error = item
            return
        chunk = msgspec.structs.replace(item, request_id=RequestId(self._request_id))
        if chunk.prompt_logprobs is not None:  # alone in what it carries at once
            _check_fits(chunk)
        self.credit -= 1
        self._session.outbox.send_chunk(chunk)

    def cancel(self, error: FerrumError) -> None:
        """End the request, if it has not ended; the client is told why."""
        generation = self.generation
        if generation is not None and not generation.is_finished:
            self._error = error
            self._session.engine.abandon(generation)

    def close(self) -> None:
        assert self.generation is not None  # only an admitted request is closed
        if self._error is not None:
            self._session.end(self._request_id, self, failure(self._error, self._request_id))
            return
        metrics = self.generation.metrics()
        self._session.end(
            self._request_id,
            self,
            Finished(
                request_id=self._request_id,
                queue_s=metrics.queue_s,
                ttft_s=metrics.ttft_s,
                total_s=metrics.total_s,
            ),
        )


def _check_fits(chunk: StreamChunk) -> None:
    try:
        encode(Chunks(chunks=[chunk]))
    except InvalidFormat as error:
        raise ResourceExhausted(
            f"prompt_logprobs: those of this prompt take more than the {MAX_FRAME_BYTES} bytes of a frame; ask for "
            "fewer, or for a part of the prompt at a time"
        ) from error


def failure(error: FerrumError, request_id: str = "") -> Failed:
    """The message for an error."""
    retry_after = error.retry_after if isinstance(error, ResourceExhausted) else None
    message = str(error)[:MAX_FAILURE_LENGTH]
    return Failed(request_id=request_id, code=error.code, message=message, retry_after=retry_after)


class _Stall:
    """For how long something that is waited for has not moved."""

    def __init__(self, now: float) -> None:
        self._progress, self._since = -1, now

    def seconds(self, now: float, *, is_waited_for: bool, progress: int) -> float:
        if not is_waited_for or progress != self._progress:
            self._progress, self._since = progress, now
        return now - self._since


class Turns:
    """Connections with more to say than is handled at once: one of them goes on in each turn of the event loop, so that
    however many there are the engine has its turn as well."""

    def __init__(self) -> None:
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()

    def wait(self, go_on: Callable[[], None]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        self._waiting.append(go_on)

    def _next(self) -> None:
        try:
            self._waiting[0]()
        finally:
            self._waiting.popleft()
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._next)


class Session(asyncio.Protocol):
    """A connection of ``user``'s. ``on_lost`` is called once, when it is gone. Prefixes are shared among one user's requests
    alone. ``turns`` is the same for all of a server's."""

    def __init__(
        self, engine: Runtime, user: User, limits: DaemonLimits, turns: Turns, on_lost: Callable[["Session"], None]
    ) -> None:
        self.engine, self.user, self.limits = engine, user, limits
        self._turns = turns
        self._on_lost = on_lost
        self.number = next(_numbers)
        self._state = _State.GREETING
        self._decoder = client_decoder(limits.frame_bytes)
        self._sinks: dict[str, _WireSink] = {}
        self.outbox = Outbox(self._flushed, self.cut)
        self._is_reading_paused = False
        self._num_started = self._num_handled = self._num_buffered = 0
        self._loop = asyncio.get_running_loop()
        self._state_since = self._loop.time()
        self._input_stall, self._output_stall = _Stall(self._state_since), _Stall(self._state_since)
        self._transport: asyncio.Transport

    @property
    def is_lost(self) -> bool:
        """Nothing of it is left."""
        return self._state is _State.LOST

    # -- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.outbox.open(self._transport)

    def data_received(self, data: bytes) -> None:
        if self._state in (_State.GREETING, _State.OPEN):
            self._take_in(data)

    def pause_writing(self) -> None:
        """The transport has enough."""
        self.outbox.pause()

    def resume_writing(self) -> None:
        """It has room again."""
        self.outbox.resume()

    def eof_received(self) -> bool:
        """Who has nothing more to say cannot give credit either: it is gone. What it had coming it may still read."""
        if self._state in (_State.GREETING, _State.OPEN):
            self._leave("the client has hung up")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._enter(_State.LOST)
        self._cancel_all(Cancelled("the client is gone"))
        self.user.num_bytes -= self._num_buffered
        self._on_lost(self)

    def cut(self, error: FerrumError) -> None:
        """Say why, and close; what the client does not read within a time it never will."""
        if self._state in (_State.CLOSING, _State.LOST):
            return
        self._enter(_State.CLOSING)
        _log.info("cut off", extra={"connection": self.number, "uid": self.user.uid, "code": error.code})
        self._cancel_all(error)
        self.outbox.send(failure(error))
        self._close()

    def go_away(self, reason: str, drain_s: float) -> None:
        """Say that no new work is taken; to who has not said hello yet, that it comes too late."""
        if self._state is _State.OPEN:
            self.outbox.send(GoingAway(reason=reason, drain_s=drain_s))
        else:
            self.cut(Cancelled(reason))

    def _leave(self, reason: str) -> None:
        self._enter(_State.CLOSING)
        self._close()
        self._cancel_all(Cancelled(reason))  # nobody is told any more

    def _close(self) -> None:
        self._decoder.clear()  # what it has begun to say takes no more room
        self.outbox.close()

    def abort(self) -> None:
        """Close without waiting for anybody to read."""
        self._transport.abort()

    def check(self, now: float) -> None:
        """Called about once a second: nobody may take for ever."""
        waiting = self.outbox.num_waiting_bytes
        match self._state:
            case _State.GREETING if now - self._state_since > HELLO_LIMIT_S:
                self.cut(InvalidFormat(f"no hello came within {HELLO_LIMIT_S:g} s"))
            case _State.CLOSING if now - self._state_since > CLOSE_LIMIT_S:
                self.abort()
            case _State.OPEN:
                limit = self.limits.stall_s
                is_partial = self._decoder.num_held_bytes > 0
                if self._input_stall.seconds(now, is_waited_for=is_partial, progress=self._num_handled) > limit:
                    self.cut(InvalidFormat(f"a frame was begun and not finished within {limit:g} s"))
                sent = self.outbox.num_written - waiting
                if self._output_stall.seconds(now, is_waited_for=waiting > 0, progress=sent) > limit:
                    self.cut(ResourceExhausted(f"nothing was read for {limit:g} s, with {waiting} bytes waiting"))
        self._account(waiting)

    def _enter(self, state: _State) -> None:
        self._state, self._state_since = state, self._loop.time()

    def _cancel_all(self, error: FerrumError) -> None:
        for sink in list(self._sinks.values()):
            sink.cancel(error)

    def _account(self, waiting: int) -> None:
        """Count what is held for this connection. Where a user's are too much, those with more than an equal share go."""
        held = waiting + self._decoder.num_held_bytes
        user, limit = self.user, self.limits.user_bytes
        user.num_bytes += held - self._num_buffered
        self._num_buffered = held
        if user.num_bytes > limit and held * user.num_connections > limit:
            self.cut(
                ResourceExhausted(f"this user's connections and requests hold more than {limit} bytes, this one {held}")
            )
            if waiting:  # it does not read, and what it was sent would take room for as long as it may yet
                self.abort()

    # -- messages in --------------------------------------------------------------------------------------------------

    def _take_in(self, data: bytes = b"") -> None:
        """Handle what is complete, a few messages at a time: a flood waits for its turn like everybody else."""
        messages = self._decoder.feed(data)
        count = num_bytes = 0
        try:
            for message in islice(messages, _HANDLE_AT_ONCE):
                self._handle(message)
                count += 1
                num_bytes += self._decoder.message_bytes
                if self._state is not _State.OPEN:
                    return
                if num_bytes >= _HANDLE_BYTES:
                    break
        except FerrumError as error:
            self.cut(error)
            return
        finally:
            messages.close()
        self._num_handled += count
        self._account(self.outbox.num_waiting_bytes)
        if count == _HANDLE_AT_ONCE or num_bytes >= _HANDLE_BYTES:
            self._pause_reading()
            self._turns.wait(self._take_in_more)
        elif self._is_reading_paused:
            self._is_reading_paused = False
            self._transport.resume_reading()

    def _take_in_more(self) -> None:
        if self._state is _State.OPEN:
            self._take_in()

    def _pause_reading(self) -> None:
        if not self._is_reading_paused:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def _handle(self, message: ClientMessage) -> None:
        if (self._state is _State.GREETING) is not isinstance(message, Hello):
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
            case Query() | EndSession() | ForkSession():
                self.outbox.send(answer(self.engine, self.user, message))
            case Goodbye():
                self._leave("the client has said goodbye")

    def _greet(self, hello: Hello) -> None:
        if hello.version != VERSION:
            raise Unsupported(f"version {hello.version} of the protocol is not spoken here; {VERSION} is")
        self._enter(_State.OPEN)
        limits = Limits(frame_bytes=self.limits.frame_bytes, requests=self.limits.connection_requests)
        config = msgspec.json.encode(self.engine.config).decode()
        self.outbox.send(Welcome(version=VERSION, model=self.engine.model_info.id, limits=limits, config=config))

    def _submit(self, message: Submit) -> None:
        request_id = message.request_id
        if request_id in self._sinks:
            raise InvalidFormat(f"request_id {request_id!r} is under way already in this connection")
        try:
            self._sinks[request_id] = self._start(message)
        except FerrumError as error:
            self.outbox.send(failure(error, request_id))
        else:
            self.outbox.send_within(_ACCEPT_WITHIN_S, Accepted(request_id=request_id))

    def _start(self, message: Submit) -> _WireSink:
        if len(self._sinks) >= self.limits.connection_requests:
            raise ResourceExhausted(f"this connection has {len(self._sinks)} requests under way, which is all it may")
        self._check_sizes(message.request)
        prompt, fields = from_wire(message.request)
        self._num_started += 1
        fields["id"] = f"{self.number}/{self._num_started}"
        request = build_request(prompt, fields)
        request = msgspec.structs.replace(request, client_id=self.user.client_id(request.client_id))
        cost = self._cost(request)
        sink = _WireSink(self, message.request_id, min(message.credit, MAX_CREDIT), cost)
        self.user.take(cost, self.limits)
        token = context.attach(_TRACE_CONTEXT.extract(message.trace)) if message.trace else None
        try:
            sink.generation = self.engine.start(request, sink)
        except FerrumError:
            self.user.give_back(cost, None)
            raise
        finally:
            if token is not None:
                context.detach(token)
        return sink

    def _check_sizes(self, wire: WireRequest) -> None:
        """Before the request is put together, which takes the event loop longer than to see that it is too much."""
        info = self.engine.model_info
        messages = wire.messages or ()
        if len(messages) + sum(len(message.tool_calls) for message in messages) > MAX_MESSAGES:
            raise RequestValidationError(f"prompt: more than {MAX_MESSAGES} messages and tool calls in them")
        for name, packed, limit in (
            ("prompt", wire.token_ids, info.max_model_len),
            ("allowed_token_ids", wire.sampling.allowed_token_ids, info.vocab_size),
        ):
            if packed is not None and num_packed(packed) > limit:
                raise RequestValidationError(f"{name}: {num_packed(packed)} token ids, where at most {limit} make sense")

    def _cost(self, request: InferenceRequest) -> Cost:
        """At most: a token of a text stands for at least one of its bytes."""
        params, num_bytes = request.sampling_params, self._decoder.message_bytes
        max_len = self.engine.model_info.max_model_len
        num_prompt = min(len(request.prompt) if is_token_ids(request.prompt) else num_bytes, max_len)
        max_tokens = params.max_tokens or self.engine.config.sampling.max_tokens
        num_scores = num_prompt * (params.prompt_logprobs or 0)
        return Cost(min(num_prompt + max_tokens, max_len) * params.n + num_scores, num_bytes)

    def _give_credit(self, message: Credit) -> None:
        sink = self._sinks.get(message.request_id)
        if sink is not None and sink.generation is not None:  # else it has ended meanwhile
            sink.credit = min(sink.credit + message.chunks, MAX_CREDIT)
            if not sink.is_full:
                self.engine.resume(sink.generation)

    # -- messages out -------------------------------------------------------------------------------------------------

    def end(self, request_id: str, sink: _WireSink, message: Finished | Failed) -> None:
        """A request's last message."""
        del self._sinks[request_id]
        self.user.give_back(sink.cost, sink.generation)
        sink.generation = None  # which knows of the sink: a cycle is only found by a collection, and that stops the loop
        self.outbox.send(message)

    def _flushed(self) -> None:
        waiting = self.outbox.num_waiting_bytes
        if waiting > self.limits.connection_output_bytes:
            self.cut(ResourceExhausted(f"{waiting} bytes wait for this client to read them, which is more than may"))
        else:
            self._account(waiting)
