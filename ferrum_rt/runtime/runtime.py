"""The runtime: opens the channels and the tasks, takes requests in, and closes everything again."""

import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import anyio
import anyio.lowlevel

from ferrum_rt.interfaces.config import ConfigFields, EngineConfig, build_config
from ferrum_rt.interfaces.engine import ChunkSink
from ferrum_rt.interfaces.errors import (
    Cancelled,
    EngineFailed,
    FerrumError,
    NotFound,
    RequestValidationError,
    ResourceExhausted,
    TokenizerError,
    first_of,
    without_words,
)
from ferrum_rt.interfaces.grammar import Grammar
from ferrum_rt.interfaces.requests import RequestFields, build_request, check_sessions, check_vocabulary, due_within
from ferrum_rt.interfaces.responses import assemble
from ferrum_rt.interfaces.scheduler import SavedState, SequenceUpdate
from ferrum_rt.interfaces.types import (
    DEFAULT_CLIENT,
    Arrival,
    ClientId,
    EngineMetrics,
    EngineState,
    EngineStatus,
    HealthStatus,
    InferenceRequest,
    InferenceResponse,
    MemoryPressure,
    ModelInfo,
    Prompt,
    RequestId,
    SchedulerDiagnostics,
    SessionId,
    StreamChunk,
)
from ferrum_rt.runtime.arrivals import MAX_ARRIVALS, ArrivalLog
from ferrum_rt.runtime.chunk_stream import ChunkStream
from ferrum_rt.runtime.engine import EngineLoop
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.instruments import record, watch
from ferrum_rt.runtime.loading.loader import LoadedModel, load_model
from ferrum_rt.runtime.preparation import Preparation
from ferrum_rt.runtime.pressure import PressureWatch
from ferrum_rt.runtime.reports import engine_health, engine_status
from ferrum_rt.runtime.resolve import EncodedRequest, resolve
from ferrum_rt.runtime.scheduling.admission import AdmissionPolicy
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.scheduler import UnifiedScheduler
from ferrum_rt.runtime.scheduling.sessions import Sessions
from ferrum_rt.runtime.step_trace import StepTrace
from ferrum_rt.runtime.threads.lag import LoopLag
from ferrum_rt.runtime.threads.worker import Worker

# Updates turned into text before the loop is yielded to others.
_DETOKENIZE_AT_ONCE = 256


def open_runtime(
    model: str | Path | None = None, *, config: EngineConfig | None = None, **config_fields: Unpack[ConfigFields]
) -> "Runtime":
    """An engine in this process: ``async with open_runtime(...) as engine``.

    ``model`` is a directory in Hugging Face's layout or a hub id; None is the demo model that ships with the package.
    The keywords are EngineConfig's parts by name, and the shortcuts ``device``, ``dtype``, ``kv_dtype``,
    ``max_model_len`` and ``load_format``; they are laid over ``config``. Raises ConfigError at once for a wrong one;
    opening it raises ModelError, TokenizerError or DeviceError when the model cannot be loaded.
    """
    return Runtime(build_config(None if model is None else str(model), config, config_fields))


class Runtime:
    """The in-process InferenceEngine. Use it as an async context manager, in the task that opened it.

    ``load`` builds the model, in the executor's thread; tests give one that loads fakes.
    """

    def __init__(self, config: EngineConfig, load: Callable[[EngineConfig], LoadedModel] = load_model) -> None:
        self._config = config
        self._load = load
        self._state = EngineState.STARTING
        self._failure: EngineFailed | None = None
        self._opened_at = time.monotonic()
        self._active: dict[RequestId, Generation] = {}
        self._counts = dict.fromkeys(("finished", "failed", "cancelled", "rejected"), 0)
        self._idle = anyio.Event()
        self._arrivals = ArrivalLog()
        self._pressure = PressureWatch()
        self._lag = LoopLag()
        self._process_id = os.getpid()
        self._exit_stack = AsyncExitStack()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Runtime":
        self._tasks_scope = anyio.CancelScope()
        async with AsyncExitStack() as stack:
            closing = stack.enter_context(ExitStack())  # after the threads have ended
            self._executor_thread = await stack.enter_async_context(Worker("ferrum-executor", self._lag))
            self._tokenizer_thread = await stack.enter_async_context(Worker("ferrum-tokenizer", self._lag))
            self._compiler_thread = await stack.enter_async_context(Worker("ferrum-grammar-compiler", self._lag))
            await self._executor_thread.run(partial(self._load_model, closing))
            self._set_up(stack)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            # Not tasks.start: where asyncio cancels a task that has not begun, that waits for ever (anyio 4.16).
            tasks.start_soon(self._run, name="ferrum runtime")
            self._exit_stack = stack.pop_all()
        self._state = EngineState.READY
        return self

    def _load_model(self, closing: ExitStack) -> None:
        """In the executor's thread. It may come to its end although nobody waits for it any more."""
        self._model = self._load(self._config)
        closing.callback(self._model.executor.close)

    def _set_up(self, stack: AsyncExitStack) -> None:
        """What the tasks work with. ``stack`` closes the channels, for the tasks may not even begin."""
        config, executor = self._config, self._model.executor
        self._cache = PagedKvCache(
            executor.num_pages, config.kv_cache.block_size, prefix_caching=config.kv_cache.prefix_caching
        )
        self._scheduler = UnifiedScheduler(
            self._cache,
            num_slots=executor.num_slots,
            max_model_len=executor.model_info.max_model_len,
            config=config.scheduler,
            num_host_pages=executor.num_host_pages,
            page_bytes=executor.page_bytes,
            max_rounds=executor.max_rounds,
        )
        self._admission = AdmissionPolicy(config.scheduler, self._retry_after)
        self._preparation = Preparation(
            self._model,
            config,
            self._admission.capacity,
            submit=self._submit,
            fail=self._fail,
            retry_after=self._retry_after,
        )
        to_detokenizer, self._updates = anyio.create_memory_object_stream[list[SequenceUpdate]](1)
        for channel in (self._preparation, to_detokenizer, self._updates):
            stack.callback(channel.close)
        self._engine = EngineLoop(
            self._scheduler,
            executor,
            self._executor_thread,
            to_detokenizer,
            max_batched_tokens=config.batching.max_batched_tokens,
            steps=StepTrace(self._active, self._scheduler),
        )
        watch(self, executor.model_info.id)

    async def _run(self) -> None:
        """The tasks, in a scope and a group of their own: cancelling them does not touch the caller's task, and a fault of
        ours ends every request with EngineFailed instead of ending the host's program."""
        try:
            with self._tasks_scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._preparation.tokenize, self._tokenizer_thread, name="ferrum tokenizer")
                    tasks.start_soon(self._preparation.compile, self._compiler_thread, name="ferrum grammar compiler")
                    tasks.start_soon(self._engine.run, name="ferrum engine")
                    tasks.start_soon(self._detokenize, name="ferrum detokenizer")
        except Exception as error:
            self._break(error)
        except anyio.get_cancelled_exc_class():
            self._stop()  # with the host; or by somebody who cancels every task that there is

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_forked:
            return  # tasks, threads and pages are the parent's
        try:
            if kind is None:
                await self.shutdown()
        finally:  # whatever the host's block raised, or if the host is cancelled while the engine drains
            self._stop()
            await self._exit_stack.__aexit__(None, None, None)
        if self._failure is None:
            self._cache.verify()

    async def shutdown(self) -> None:
        """Refuse new requests, let those under way finish for ``scheduler.drain_s`` seconds, cancel the rest."""
        if self._state in (EngineState.READY, EngineState.FAILED) and not self._is_forked:
            self._state = EngineState.DRAINING
            if self._active:
                with anyio.move_on_after(self._config.scheduler.drain_s):
                    await self._idle.wait()
            self._stop()

    @property
    def _is_forked(self) -> bool:
        """This is a copy in a child process, which has none of the threads."""
        return os.getpid() != self._process_id

    def _stop(self) -> None:
        self._state = EngineState.STOPPED
        for generation in list(self._active.values()):
            self._fail(generation, Cancelled("the engine is shutting down"), "cancelled")
        self._tasks_scope.cancel()

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """What the engine was opened with."""
        return self._config

    @property
    def model_info(self) -> ModelInfo:
        """The loaded model."""
        return self._model.executor.model_info

    async def infer(self, prompt: Prompt | InferenceRequest, **fields: Unpack[RequestFields]) -> InferenceResponse:
        """Generate to the end. Raises the request's FerrumError; cancelling this task cancels the request."""
        return await self._infer(build_request(prompt, fields))

    @asynccontextmanager
    async def infer_stream(
        self, prompt: Prompt | InferenceRequest, **fields: Unpack[RequestFields]
    ) -> AsyncIterator[AsyncIterator[StreamChunk]]:
        """The request's chunks as they come; the last has a ``finish_reason``. Leaving the block cancels what is left."""
        with self._open(build_request(prompt, fields)) as (_, chunks):
            yield chunks

    async def infer_batch(
        self, prompts: Sequence[Prompt | InferenceRequest], **fields: Unpack[RequestFields]
    ) -> list[InferenceResponse | FerrumError]:
        """A response or an error for each prompt, in their order. Any number may be given: they are fed in as there is
        room, at most twice what can run at once."""
        results: list[InferenceResponse | FerrumError] = [EngineFailed("not run")] * len(prompts)
        limiter = anyio.CapacityLimiter(2 * self._config.scheduler.max_running_requests)

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
        with self._open(request) as (generation, chunks):
            received = [chunk async for chunk in chunks]
            return assemble(received, generation.metrics())

    @contextmanager
    def _open(self, request: InferenceRequest) -> Iterator[tuple[Generation, ChunkStream]]:
        self._check_takes_requests()
        capacity = self._config.batching.stream_capacity
        chunks = ChunkStream(request.sampling_params.n, capacity, lambda: self.resume(generation))
        try:
            left_s = anyio.current_effective_deadline() - anyio.current_time()  # until the caller's cancel scopes end it
            generation = self.start(due_within(request, left_s), chunks)
            try:
                yield generation, chunks
            finally:
                self.abandon(generation)
        finally:
            chunks.abandon()

    def _check_takes_requests(self) -> None:
        if self._is_forked:
            raise EngineFailed(f"this engine is that of process {self._process_id}; open one of its own in a forked process")
        if self._failure is not None:
            raise self._failure
        if self._state is not EngineState.READY:
            raise Cancelled(f"the engine takes no requests: its state is {self._state.value}")

    # -- requests whose chunks go somewhere else ----------------------------------------------------------------------

    def start(self, request: InferenceRequest, sink: ChunkSink) -> Generation:
        """Admit a request that ``build_request`` made; its chunks go to ``sink``, then its error if it has one, and then the
        sink is closed. Raises the FerrumError of a request that is not admitted, without touching the sink."""
        self._check_takes_requests()
        if request.id in self._active:
            raise RequestValidationError(f"id: a request {request.id!r} is already under way")
        if request.model_id not in (None, self.model_info.id):
            raise NotFound(f"model_id: this engine runs {self.model_info.id!r}, not {request.model_id!r}")
        check_vocabulary(request.sampling_params, self.model_info.vocab_size)
        try:
            self._admission.admit(request.client_id, self._preparation.num_queued)
        except ResourceExhausted:
            self._counts["rejected"] += 1
            raise
        captures = self._config.monitoring.capture_content
        generation = Generation(request, sink, time.monotonic(), self.model_info.id, captures=captures)
        self._preparation.put(generation)
        self._active[request.id] = generation
        return generation

    def resume(self, generation: Generation) -> None:
        """Its sink has room again."""
        if generation.is_parked and not generation.is_finished:
            generation.unpark(time.monotonic(), runs=self._scheduler.unpark(generation.request.id))
            self._engine.notify()

    def abandon(self, generation: Generation) -> None:
        """The caller has left. Synchronous, so that no cancellation can come between."""
        if not generation.is_finished:
            self._end(generation, "cancelled")
            self._drop(generation)
            self._engine.notify()

    # -- what can be changed while it runs ------------------------------------------------------------------------------

    def reconfigure(self, **fields: Any) -> None:
        """Change fields of the scheduler's configuration for what is planned and admitted from now on: clients' policies,
        the pace, limits. Raises ConfigError, and then nothing has changed."""
        config = build_config(None, self._config, {"scheduler": fields})
        self._admission.reconfigure(config.scheduler)
        self._config = config
        self._scheduler.reconfigure(config.scheduler)
        self._engine.notify()

    def on_memory_pressure(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Have ``callback`` called on the event loop whenever the pressure on the pages reaches another level."""
        self._pressure.add(callback)

    # -- sessions -----------------------------------------------------------------------------------------------------

    async def end_session(self, session_id: SessionId, client_id: ClientId = DEFAULT_CLIENT) -> bool:
        """Give up what a session keeps; False if there is no such session (any more)."""
        check_sessions(client_id, session_id=session_id)
        return self.sessions().end(client_id, session_id)

    async def fork_session(
        self, session_id: SessionId, new_session_id: SessionId, client_id: ClientId = DEFAULT_CLIENT
    ) -> None:
        """A further session that goes on from where this one stands. Raises NotFound if there is no such session (any more),
        RequestValidationError for a name that is taken."""
        check_sessions(client_id, session_id=session_id, new_session_id=new_session_id)
        self.sessions().fork(client_id, session_id, new_session_id)

    def sessions(self) -> Sessions:
        """For those who cannot wait, and have checked the names. Raises what a request would raise that came now."""
        self._check_takes_requests()
        return self._scheduler.sessions

    # -- reports ------------------------------------------------------------------------------------------------------

    def export_state(self) -> SavedState:
        """What the scheduler has under way, for another to go on with; it holds the tokens of prompts and outputs."""
        return self._scheduler.export_state(time.monotonic())

    def arrivals(self, last: int = MAX_ARRIVALS) -> list[Arrival]:
        """When requests came and how large they were, of those that ended ``last``: a workload for ``ferrum-rt simulate``,
        and nothing of what was in them."""
        return self._arrivals.export(last)

    def diagnostics(self) -> SchedulerDiagnostics:
        """Why the scheduler does what it does."""
        return self._scheduler.diagnostics()

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Requests that have ended, or were refused, by how."""
        return self._counts

    def metrics(self) -> EngineMetrics:
        """Counters since the start. In any thread."""
        counters = self._engine.counters
        return EngineMetrics(
            steps=counters.steps,
            step_s=counters.step_s,
            host_s=counters.host_s,
            scheduler=self._scheduler.statistics(),
            loop_lag_s=self._lag.total_s,
            max_loop_lag_s=self._lag.max_s,
        )

    async def status(self) -> EngineStatus:
        """A snapshot."""
        return self.status_now()

    def status_now(self) -> EngineStatus:
        """The same, for those who cannot wait."""
        return engine_status(
            self._state,
            self._model.executor,
            self._scheduler.statistics(),
            self._counts,
            num_active=len(self._active),
            uptime_s=time.monotonic() - self._opened_at,
        )

    async def health_check(self) -> HealthStatus:
        """Whether each component can do its work."""
        return self.health_now()

    def health_now(self) -> HealthStatus:
        """The same, for those who cannot wait."""
        threads = {
            "executor": self._executor_thread,
            "tokenizer": self._tokenizer_thread,
            "grammar compiler": self._compiler_thread,
        }
        is_ready = self._state is EngineState.READY
        return engine_health(threads, "" if is_ready else str(self._failure or f"state is {self._state.value}"))

    # -- a request's way through --------------------------------------------------------------------------------------

    def _submit(self, generation: Generation, encoded: EncodedRequest, grammar: Grammar | None) -> None:
        try:
            generation.tokenized(encoded.token_ids, self._model.tokenizer, self._model.tool_format)
            self._scheduler.submit(resolve(encoded, grammar, self._model, self._config, generation.submitted_at))
            self._engine.notify()
        except Exception as error:  # what is wrong with the request, or whatever its prompt does to a detokenizer
            self._fail(generation, without_words(TokenizerError, "the prompt cannot be gone on from", error))

    async def _detokenize(self) -> None:
        async for batch in self._updates:
            self._pressure.look(self._cache.pressure)
            for index, update in enumerate(batch, start=1):
                self._deliver(update)
                if index % _DETOKENIZE_AT_ONCE == 0:
                    await anyio.lowlevel.checkpoint()

    def _deliver(self, update: SequenceUpdate) -> None:
        generation = self._active.get(update.request_id)
        if generation is None:
            return  # cancelled, or ended by a stop string
        if update.error is not None:
            self._fail(generation, update.error)
            return
        try:
            reason = generation.advance(update, time.monotonic())
        except Exception as error:  # whatever the output's text does to those who read it
            self._fail(generation, without_words(TokenizerError, "the output cannot be turned into text", error))
            return
        if reason is not None and update.finish_reason is None:  # a stop string, which the scheduler knows nothing of
            self._drop(generation, update.index)
        if generation.has_ended:
            self._end(generation, "finished")
        elif not generation.is_parked and generation.sink.is_full:
            generation.park(time.monotonic())
            self._scheduler.park(update.request_id)

    # -- a request's end ----------------------------------------------------------------------------------------------

    def _fail(self, generation: Generation, error: FerrumError, outcome: str = "failed") -> None:
        generation.fail(error)
        self._end(generation, outcome)
        self._drop(generation)

    def _drop(self, generation: Generation, index: int | None = None) -> None:
        """Take the request from the scheduler, if it is still there; or one of its outputs, which is complete."""
        if self._failure is None:
            try:
                if index is None:
                    self._scheduler.cancel(generation.request.id)
                else:
                    self._scheduler.end_well(generation.request.id, index)
            except EngineFailed as error:  # the page ledger does not add up; nobody may go on with these pages
                self._break(error)

    def _break(self, error: Exception) -> None:
        """The engine is lost: every request ends with EngineFailed, and so does every later one."""
        self._failure = EngineFailed(f"the engine met an internal fault: {first_of(error)!r}")
        self._failure.__cause__ = error
        self._state = EngineState.FAILED
        self._tasks_scope.cancel()
        for generation in list(self._active.values()):
            self._fail(generation, self._failure)

    def _end(self, generation: Generation, outcome: str) -> None:
        """The one place where a request ends."""
        del self._active[generation.request.id]
        self._admission.leave(generation.request.client_id)
        generation.close(outcome, time.monotonic())
        self._arrivals.add(generation)
        record(generation, self.model_info.id)
        self._counts[outcome] += 1
        if not self._active:
            self._idle.set()
            self._idle = anyio.Event()

    def _retry_after(self) -> float:
        """When there may be room again: what a request has taken of the engine's time so far, or what those who wait are
        expected to, each."""
        wait_s = self._scheduler.estimated_wait_s() / max(1, len(self._active))
        return wait_s or self._engine.counters.step_s / max(1, self._counts["finished"]) or 1.0
