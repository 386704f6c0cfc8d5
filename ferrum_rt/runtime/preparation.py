"""Between admission and the scheduler: prompts become token ids, response formats grammars, each in a thread of its own."""

from collections.abc import Callable
from functools import partial

import anyio

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import BackendError, FerrumError, ResourceExhausted, TokenizerError, without_words
from ferrum_rt.interfaces.grammar import Grammar
from ferrum_rt.interfaces.types import InferenceRequest
from ferrum_rt.runtime.generation import Generation
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.resolve import EncodedRequest, compile_grammar, encode, has_text, is_constrained
from ferrum_rt.runtime.threads.worker import Worker

# Requests tokenized in one call.
_TOKENIZE_AT_ONCE = 64


class Preparation:
    """Two tasks, ``tokenize`` and ``compile``, each behind a queue with room for ``capacity`` requests. Those that have not
    ended meanwhile go to ``submit``, or to ``fail`` where something is wrong; ``retry_after`` is told to one that finds no
    room before the compiler."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        capacity: int,
        *,
        submit: Callable[[Generation, EncodedRequest, Grammar | None], None],
        fail: Callable[[Generation, FerrumError], None],
        retry_after: Callable[[], float],
    ) -> None:
        self._model, self._config = model, config
        self._submit, self._fail, self._retry_after = submit, fail, retry_after
        self._to_tokenizer, self._admitted = anyio.create_memory_object_stream[Generation](capacity)
        self._to_compiler, self._encoded = anyio.create_memory_object_stream[tuple[Generation, EncodedRequest]](capacity)

    @property
    def num_queued(self) -> int:
        """Before the tokenizer, those among them that have ended."""
        return self._to_tokenizer.statistics().current_buffer_used

    def put(self, generation: Generation) -> None:
        """One that was admitted, so that there is room."""
        self._to_tokenizer.send_nowait(generation)

    def close(self) -> None:
        """The tasks have ended, or have not even begun."""
        for stream in (self._to_tokenizer, self._to_compiler, self._admitted, self._encoded):
            stream.close()

    async def tokenize(self, thread: Worker) -> None:
        """Several prompts in one call where several wait."""
        async for first in self._admitted:
            batch = [first]
            while len(batch) < _TOKENIZE_AT_ONCE and self._admitted.statistics().current_buffer_used:
                batch.append(self._admitted.receive_nowait())
            waiting = [generation for generation in batch if not generation.is_finished]
            results = await self._encode([generation.request for generation in waiting], thread)
            for generation in batch:
                generation.is_queued = False
            for generation, result in zip(waiting, results, strict=True):
                if generation.is_finished:
                    continue
                if isinstance(result, FerrumError):
                    self._fail(generation, result)
                elif is_constrained(generation.request):
                    self._queue_for_compiler(generation, result)
                else:
                    self._submit(generation, result, None)

    async def compile(self, thread: Worker) -> None:
        """Grammars, one after the other; requests that have none do not wait for them."""
        async for generation, request in self._encoded:
            try:
                if generation.is_finished:
                    continue
                grammar = await thread.run(partial(compile_grammar, generation.request, self._model))
            except Exception as error:  # whatever a grammar does to its compiler
                if not generation.is_finished:
                    self._fail(generation, without_words(BackendError, "the grammar cannot be compiled", error))
                continue
            finally:
                generation.is_queued = False
            if not generation.is_finished:
                self._submit(generation, request, grammar)

    def _queue_for_compiler(self, generation: Generation, request: EncodedRequest) -> None:
        try:
            self._to_compiler.send_nowait((generation, request))
        except anyio.WouldBlock:  # full of requests that were cancelled and that it has not come to yet
            error = ResourceExhausted("as many grammars as may wait to be compiled", retry_after=self._retry_after())
            self._fail(generation, error)
        else:
            generation.is_queued = True

    async def _encode(self, requests: list[InferenceRequest], thread: Worker) -> list[EncodedRequest | FerrumError]:
        """Token ids, or what is wrong, for each; off the event loop if there is any text among them."""
        if not any(has_text(request) for request in requests):
            return [self._encode_one(request) for request in requests]
        return await thread.run(lambda: [self._encode_one(request) for request in requests])

    def _encode_one(self, request: InferenceRequest) -> EncodedRequest | FerrumError:
        try:
            return encode(request, self._model, self._config)
        except FerrumError as error:
            return error
        except Exception as error:  # whatever a tokenizer or a template makes of this prompt, it is this request's
            return without_words(TokenizerError, "the prompt cannot be encoded", error)
