"""The engine of a daemon, from another process: the same interface as in-process, over the socket. Needs no torch."""

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import anyio
import anyio.lowlevel
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import (
    Cancelled,
    ConnectionLost,
    EngineFailed,
    FerrumError,
    InvalidFormat,
    RequestValidationError,
    ResourceExhausted,
    error_classes,
    first_of,
)
from ferrum_rt.interfaces.requests import RequestFields, build_request, check_sessions, due_within
from ferrum_rt.interfaces.responses import assemble
from ferrum_rt.interfaces.types import (
    DEFAULT_CLIENT,
    Arrival,
    ClientId,
    EngineMetrics,
    EngineStatus,
    HealthStatus,
    InferenceRequest,
    InferenceResponse,
    Prompt,
    RequestId,
    RequestMetrics,
    SchedulerDiagnostics,
    SessionId,
    StreamChunk,
)
from ferrum_rt.ipc.address import socket_path
from ferrum_rt.ipc.connection import Connection, answer_within
from ferrum_rt.ipc.convert import to_wire
from ferrum_rt.ipc.framing import encode, server_decoder
from ferrum_rt.ipc.messages import (
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
    Query,
    Refused,
    Report,
    ServerMessage,
    Submit,
    Welcome,
)

CONNECT_LIMIT_S = 10.0
GOODBYE_LIMIT_S = 1.0
CREDIT = 64
_SLACK = 16  # chunks of each output that can come after the credit is spent
_TRACE_CONTEXT = TraceContextTextMapPropagator()
_METRICS = 0  # the number of the query that refreshes ``metrics()``


def connect(path: str | Path | None = None) -> "Client":
    """The engine of the daemon at ``path``, or at the user's own: ``async with connect() as engine``.

    Opening it raises NotFound where no daemon listens, PermissionDenied where it does not want us, ConnectionLost where it
    hangs up. Once the connection is lost every call raises ConnectionLost; open another to connect again.
    """
    return Client(socket_path(path))


class Client:
    """An InferenceEngine over a socket. Use it as an async context manager, in the task that opened it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decoder = server_decoder()
        self._replies: dict[str, _Reply] = {}
        self._request_ids: set[RequestId] = set()
        self._queries: dict[int, _Answer] = {}
        self._outbox = bytearray()
        self._has_mail, self._is_sent = anyio.Event(), anyio.Event()
        self._lost: FerrumError | None = None
        self._going_away: str | None = None
        self._num_sent = 0
        self._process_id = os.getpid()
        self._exit_stack = AsyncExitStack()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Client":
        self._tasks_scope = anyio.CancelScope()
        async with AsyncExitStack() as stack:
            self._connection = stack.enter_context(closing(Connection(self._path)))
            with answer_within(CONNECT_LIMIT_S, self._path):
                await self._connection.open()
                await self._greet()
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(self._run, name="ferrum client")
            self._exit_stack = stack.pop_all()
        return self

    async def _greet(self) -> None:
        with suppress(ConnectionLost):  # it hung up already; what it has said is still to be read
            await self._connection.send(encode(Hello(version=VERSION, client="ferrum_rt")) + encode(_metrics_query()))
        while True:
            for message in self._decoder.feed(await self._connection.receive()):
                match message:
                    case Welcome():
                        self._config = msgspec.json.decode(message.config, type=EngineConfig)
                        self._max_requests = message.limits.requests
                    case Report():
                        self._metrics = msgspec.json.decode(message.content, type=EngineMetrics)
                        return
                    case Failed():
                        raise _error(message)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_forked:
            self._connection.close()  # a copy: the parent's stays open, and its tasks are the parent's
            return
        try:
            await self.shutdown()
        finally:
            self._tasks_scope.cancel()
            await self._exit_stack.__aexit__(None, None, None)

    async def shutdown(self) -> None:
        """Leave: what is under way is cancelled, here and in the daemon, which goes on for others."""
        if self._lost is None and not self._is_forked:
            self.post(Goodbye())
            with anyio.move_on_after(GOODBYE_LIMIT_S, shield=True):
                await self._wait_for_room()  # if it cannot be said, hanging up says the same
            self._lose(Cancelled("the connection was closed by this process"))
            self._tasks_scope.cancel()

    @property
    def _is_forked(self) -> bool:
        """This is a copy in a child process, whose bytes would come between the parent's."""
        return os.getpid() != self._process_id

    def _check_usable(self) -> None:
        if self._is_forked:
            raise ConnectionLost(f"this connection is that of process {self._process_id}; connect again in a forked process")
        if self._lost is not None:
            raise _again(self._lost)

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """What the daemon's engine was opened with."""
        return self._config

    async def infer(self, prompt: Prompt | InferenceRequest, **fields: Unpack[RequestFields]) -> InferenceResponse:
        """Generate to the end. Raises the request's FerrumError; cancelling this task cancels the request."""
        return await self._infer(build_request(prompt, fields))

    @asynccontextmanager
    async def infer_stream(
        self, prompt: Prompt | InferenceRequest, **fields: Unpack[RequestFields]
    ) -> AsyncIterator[AsyncIterator[StreamChunk]]:
        """The request's chunks as they come; the last has a ``finish_reason``. Leaving the block cancels what is left."""
        request = build_request(prompt, fields)
        await self._wait_for_room()
        with self._open(request) as reply:
            yield reply

    async def infer_batch(
        self, prompts: Sequence[Prompt | InferenceRequest], **fields: Unpack[RequestFields]
    ) -> list[InferenceResponse | FerrumError]:
        """A response or an error for each prompt, in their order. Any number may be given: they are fed in as there is
        room."""
        results: list[InferenceResponse | FerrumError] = [EngineFailed("not run")] * len(prompts)
        at_once = min(2 * self._config.scheduler.max_running_requests, self._max_requests)
        limiter = anyio.CapacityLimiter(max(1, at_once))

        async def run(index: int) -> None:
            async with limiter:
                try:
                    results[index] = await self._infer(build_request(prompts[index], fields))
                except FerrumError as error:
                    results[index] = error

        async with anyio.create_task_group() as tasks:
            for index in range(len(prompts)):
                tasks.start_soon(run, index)
        return results

    async def _infer(self, request: InferenceRequest) -> InferenceResponse:
        await self._wait_for_room()
        with self._open(request) as reply:
            received = [chunk async for chunk in reply]
            return assemble(received, reply.metrics)

    @contextmanager
    def _open(self, request: InferenceRequest) -> Iterator["_Reply"]:
        self._check_usable()
        if self._going_away is not None:
            raise Cancelled(f"the daemon takes no new requests: {self._going_away}")
        if request.id in self._request_ids:
            raise RequestValidationError(f"id: a request {request.id!r} is already under way")
        self._num_sent += 1
        wire_id = str(self._num_sent)
        credit = CREDIT * request.sampling_params.n
        left_s = anyio.current_effective_deadline() - anyio.current_time()  # until the caller's cancel scopes end it
        wire = to_wire(due_within(request, left_s))
        trace: dict[str, str] = {}
        _TRACE_CONTEXT.inject(trace)  # of the span that is current here, if there is one
        self.post(Submit(request_id=wire_id, request=wire, credit=credit, trace=trace))
        reply = self._replies[wire_id] = _Reply(self, wire_id, request, credit)
        self._request_ids.add(request.id)
        try:
            yield reply
        finally:
            self._request_ids.discard(request.id)
            if self._replies.pop(wire_id, None) is not None:
                self.post(Cancel(request_id=wire_id))
            reply.abandon()

    # -- sessions -----------------------------------------------------------------------------------------------------

    async def end_session(self, session_id: SessionId, client_id: ClientId = DEFAULT_CLIENT) -> bool:
        """Give up what a session keeps; False if there is no such session (any more)."""
        check_sessions(client_id, session_id=session_id)
        return msgspec.json.decode(await self._ask(EndSession, session_id=session_id, client_id=client_id), type=bool)

    async def fork_session(
        self, session_id: SessionId, new_session_id: SessionId, client_id: ClientId = DEFAULT_CLIENT
    ) -> None:
        """A further session that goes on from where this one stands. Raises NotFound if there is no such session (any more),
        RequestValidationError for a name that is taken."""
        check_sessions(client_id, session_id=session_id, new_session_id=new_session_id)
        await self._ask(ForkSession, session_id=session_id, new_session_id=new_session_id, client_id=client_id)

    # -- reports ------------------------------------------------------------------------------------------------------

    def metrics(self) -> EngineMetrics:
        """The daemon's counters as it last reported them; each call asks it for a newer report, which the next will see."""
        self.post(_metrics_query())
        return self._metrics

    async def status(self) -> EngineStatus:
        """A snapshot of the daemon's engine."""
        return msgspec.json.decode(await self._ask(Query, kind="status"), type=EngineStatus)

    async def health_check(self) -> HealthStatus:
        """Whether each component of the daemon's engine can do its work."""
        return msgspec.json.decode(await self._ask(Query, kind="health"), type=HealthStatus)

    async def fetch_arrivals(self) -> list[Arrival]:
        """What the daemon's engine has had of all users' requests lately, as ``Runtime.arrivals`` has it. Raises
        PermissionDenied for all but the user who runs the daemon."""
        return msgspec.json.decode(await self._ask(Query, kind="arrivals"), type=list[Arrival])

    async def fetch_diagnostics(self) -> SchedulerDiagnostics:
        """Why the daemon's scheduler does what it does, and for which clients, as ``Runtime.diagnostics`` has it. Raises
        PermissionDenied for all but the user who runs the daemon."""
        return msgspec.json.decode(await self._ask(Query, kind="diagnostics"), type=SchedulerDiagnostics)

    async def _ask(self, question: Callable[..., ClientMessage], **fields: Any) -> str:
        """The content of the report that answers a message of this class. Raises what the daemon refuses it with."""
        await self._wait_for_room()
        self._check_usable()
        self._num_sent += 1
        answer = self._queries[self._num_sent] = _Answer()
        self.post(question(query_id=self._num_sent, **fields))
        return await answer.wait()

    # -- the connection -----------------------------------------------------------------------------------------------

    def post(self, *messages: ClientMessage) -> None:
        """Send, or put behind what waits to be sent. Synchronous, so that no cancellation can come between leaving a
        request and saying so. Raises InvalidFormat, with nothing sent, for what is too long for a frame."""
        if self._lost is None and not self._is_forked:
            frames = b"".join(map(encode, messages))
            sent = 0
            if not self._outbox:
                with suppress(ConnectionLost):  # the reader hears why, if the daemon has said it
                    sent = self._connection.send_nowait(frames)
            if sent < len(frames):
                self._outbox += frames[sent:]
                self._has_mail.set()

    async def _wait_for_room(self) -> None:
        """Until what was posted before is on its way: whoever adds to it waits here first."""
        while self._outbox and self._lost is None and not self._is_forked:
            await self._is_sent.wait()

    async def _run(self) -> None:
        """The tasks, in a scope and a group of their own: cancelling them does not touch the caller's task."""
        try:
            with self._tasks_scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._write, name="ferrum client writer")
                    await self._read()
        except* FerrumError as errors:
            error = first_of(errors)
            assert isinstance(error, FerrumError)  # that is what the group is of
            self._lose(error)
        except* anyio.get_cancelled_exc_class():
            if self._lost is None:  # somebody has cancelled every task that there is
                self._lose(Cancelled("the client's tasks were cancelled"))

    async def _write(self) -> None:
        """What could not be sent at once."""
        while True:
            await self._has_mail.wait()
            self._has_mail = anyio.Event()
            try:
                while self._outbox:
                    await self._connection.wait_writable()
                    del self._outbox[: self._connection.send_nowait(self._outbox)]
            except ConnectionLost:
                return  # as above
            self._is_sent.set()
            self._is_sent = anyio.Event()

    async def _read(self) -> None:
        data = b""  # first what came in one piece with the answer to the greeting
        while True:
            for message in self._decoder.feed(data):
                self._handle(message)
            await anyio.lowlevel.checkpoint()  # whoever has got something goes first
            data = await self._connection.receive()

    def _handle(self, message: ServerMessage) -> None:
        match message:
            case Chunks():
                for chunk in message.chunks:
                    if (reply := self._replies.get(chunk.request_id)) is not None:
                        reply.put(msgspec.structs.replace(chunk, request_id=reply.request.id))
            case Finished():
                if (reply := self._replies.pop(message.request_id, None)) is not None:
                    reply.finish(message)
            case Failed() if message.request_id:
                if (reply := self._replies.pop(message.request_id, None)) is not None:
                    reply.put(_error(message))
                    reply.close()
            case Failed():
                raise _error(message)
            case Report() if message.query_id == _METRICS:
                self._metrics = msgspec.json.decode(message.content, type=EngineMetrics)
            case Report():
                if (answer := self._queries.pop(message.query_id, None)) is not None:
                    answer.settle(message.content)
            case Refused():
                if (answer := self._queries.pop(message.query_id, None)) is not None:
                    answer.settle(_error(message))
            case GoingAway():
                self._going_away = message.reason
            case Accepted() | Welcome():
                pass

    def _lose(self, error: FerrumError) -> None:
        """Everybody who waits gets the error, and so does everybody who comes later."""
        self._lost = error
        for reply in self._replies.values():
            reply.put(_again(error))
            reply.close()
        for answer in self._queries.values():
            answer.settle(_again(error))
        self._replies.clear()
        self._queries.clear()
        self._outbox.clear()
        self._is_sent.set()


class _Reply:
    """A request's chunks on their way to their reader, who gives credit as it reads."""

    def __init__(self, client: Client, wire_id: str, request: InferenceRequest, credit: int) -> None:
        self.request = request
        self.metrics: RequestMetrics | None = None
        self._client, self._wire_id, self._credit = client, wire_id, credit
        self._num_read = 0
        self._send: MemoryObjectSendStream[StreamChunk | FerrumError]
        self._receive: MemoryObjectReceiveStream[StreamChunk | FerrumError]
        slack = _SLACK * request.sampling_params.n
        self._send, self._receive = anyio.create_memory_object_stream(credit + slack)

    def put(self, item: StreamChunk | FerrumError) -> None:
        try:
            self._send.send_nowait(item)
        except anyio.WouldBlock as error:
            raise InvalidFormat("the daemon sends more chunks than it was given credit for") from error

    def finish(self, message: Finished) -> None:
        self.metrics = RequestMetrics(queue_s=message.queue_s, ttft_s=message.ttft_s, total_s=message.total_s)
        self.close()

    def close(self) -> None:
        """Whatever the reader has not taken yet stays for it."""
        self._send.close()

    def abandon(self) -> None:
        self._send.close()
        self._receive.close()

    def __aiter__(self) -> "_Reply":
        return self

    async def __anext__(self) -> StreamChunk:
        try:
            item = await self._receive.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if isinstance(item, FerrumError):
            raise item
        self._num_read += 1
        if self._num_read >= self._credit // 2 and item.finish_reason is None:
            self._client.post(Credit(request_id=self._wire_id, chunks=self._num_read))
            self._num_read = 0
        return item


class _Answer:
    """What a query waits for."""

    def __init__(self) -> None:
        self._done = anyio.Event()
        self._content: str | FerrumError = ""

    def settle(self, content: str | FerrumError) -> None:
        self._content = content
        self._done.set()

    async def wait(self) -> str:
        await self._done.wait()
        if isinstance(self._content, FerrumError):
            raise self._content
        return self._content


def _metrics_query() -> Query:
    return Query(query_id=_METRICS, kind="metrics")


def _error(message: Failed | Refused) -> FerrumError:
    """The error that the engine raised, of its own class."""
    kind = error_classes().get(message.code, FerrumError)
    if kind is ResourceExhausted and isinstance(message, Failed):
        return ResourceExhausted(message.message, message.retry_after or 1.0)
    return kind(message.message)


def _again(error: FerrumError) -> FerrumError:
    """One for each who waits: an exception that several tasks raise would mix their tracebacks."""
    return type(error)(*error.args)
