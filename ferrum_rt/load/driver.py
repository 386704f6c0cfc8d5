"""Sends a load, and notes what came of each request.

In the open loop a request goes out when it is due, whatever became of those before it, and what its user waits counts from
then: a target that falls behind cannot make the load lighter, nor the figures better (*coordinated omission*). In the closed
loop so many users send their next request as soon as they have the last one's answer.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio
from opentelemetry import trace
from opentelemetry.trace import SpanKind, format_trace_id

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.types import PageCounts, RequestCounts
from ferrum_rt.load.results import Chunk, Repeat, RequestRecord, Sample
from ferrum_rt.load.targets import Target, TargetError
from ferrum_rt.load.workload import LoadRequest

SAMPLE_EVERY_S = 0.1
STATE_LIMIT_S = 1.0

_TRACER = trace.get_tracer("ferrum_rt.load")


async def put_on(
    target: Target, requests: Sequence[LoadRequest], *, concurrency: int, on_end: Callable[[RequestRecord], None]
) -> Repeat:
    """Until the last request has ended. They all have a ``due_s``, or none has: then ``concurrency`` are under way at once.
    ``on_end`` hears of each that ends."""
    run = _Run(target, on_end)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.watch)
        if requests[0].due_s is None:
            await run.closed_loop(requests, concurrency)
        else:
            await run.open_loop(requests)
        tasks.cancel_scope.cancel()
    return run.result()


class _Run:
    def __init__(self, target: Target, on_end: Callable[[RequestRecord], None]) -> None:
        self._target, self._on_end = target, on_end
        self._records: list[RequestRecord] = []
        self._samples: list[Sample] = []
        self._began_ns, self._began = time.time_ns(), time.perf_counter()

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def result(self) -> Repeat:
        records = sorted(self._records, key=lambda record: record.index)
        ended = max(record.end_s for record in records)
        return Repeat(began_ns=self._began_ns, duration_s=ended, requests=records, samples=self._samples)

    async def open_loop(self, requests: Sequence[LoadRequest]) -> None:
        async with anyio.create_task_group() as tasks:
            for request in requests:
                assert request.due_s is not None  # as put_on has it
                await anyio.sleep(max(0.0, request.due_s - self._now()))
                tasks.start_soon(self._send, request, request.due_s)

    async def closed_loop(self, requests: Sequence[LoadRequest], concurrency: int) -> None:
        left = deque(requests)

        async def user() -> None:
            while left:
                await self._send(left.popleft(), self._now())

        async with anyio.create_task_group() as tasks:
            for _ in range(min(concurrency, len(requests))):
                tasks.start_soon(user)

    async def _send(self, request: LoadRequest, due_s: float) -> None:
        """Never raises for what the target does."""
        sent_s, chunks, error = self._now(), list[Chunk](), None
        with _TRACER.start_as_current_span("request", kind=SpanKind.CLIENT) as span:
            try:
                async with self._target.stream(request) as stream:
                    async for tokens in stream:
                        chunks.append(Chunk(self._now(), tokens))
            except (FerrumError, TargetError) as failure:
                error = failure.code
            except Exception as failure:  # whatever a client library raises of its server
                error = type(failure).__name__
            context = span.get_span_context()
        record = RequestRecord(
            index=request.index,
            client=request.client,
            prompt_tokens=len(request.token_ids),
            due_s=due_s,
            sent_s=sent_s,
            end_s=self._now(),
            chunks=[chunk for chunk in chunks if chunk.tokens],
            error=error,
            trace_id=format_trace_id(context.trace_id) if context.is_valid else None,
        )
        self._records.append(record)
        self._on_end(record)

    async def watch(self) -> None:
        """Look at the target from time to time, until cancelled. One that cannot say how it is now is asked again."""
        while True:
            at_s = self._now()
            state = await self._state()
            if state is not None:
                self._samples.append(_sample(at_s, *state))
            await anyio.sleep(SAMPLE_EVERY_S)

    async def _state(self) -> tuple[RequestCounts, PageCounts] | None:
        with suppress(Exception), anyio.move_on_after(STATE_LIMIT_S):  # what is wrong with it the requests will tell
            return await self._target.state()
        return None


def _sample(at_s: float, requests: RequestCounts, pages: PageCounts) -> Sample:
    return Sample(
        at_s=at_s,
        running=requests.running,
        waiting=requests.waiting,
        parked=requests.parked,
        pages_free=pages.free,
        pages_active=pages.active,
        pages_cached=pages.cached,
    )
