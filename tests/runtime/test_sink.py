"""Requests whose chunks go to a ChunkSink of the caller's, as the daemon's do."""

import pytest

from ferrum_rt.interfaces.errors import BackendError, FerrumError, ResourceExhausted
from ferrum_rt.interfaces.requests import build_request
from ferrum_rt.interfaces.types import InferenceRequest, RequestId, StreamChunk
from tests.runtime.engines import fake_engine, text_after, until


class Bucket:
    """A ChunkSink that is full with ``room`` chunks."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.chunks: list[StreamChunk] = []
        self.error: FerrumError | None = None
        self.is_closed = False

    @property
    def is_full(self) -> bool:
        return len(self.chunks) >= self.room

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def put(self, item: StreamChunk | FerrumError) -> None:
        assert not self.is_closed
        assert self.error is None, "something came after the error"
        if isinstance(item, FerrumError):
            self.error = item
        else:
            self.chunks.append(item)

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


def ask(prompt: str, **fields: object) -> InferenceRequest:
    return build_request(prompt, {"max_tokens": 40, **fields})


async def test_a_sink_gets_every_chunk_and_then_is_closed() -> None:
    """The chunks in order, the last one with its reason, then the end."""
    bucket = Bucket()
    async with fake_engine() as (engine, _):
        engine.start(ask("hello"), bucket)
        await until(lambda: bucket.is_closed)
        assert (await engine.status()).requests.finished == 1
    assert bucket.text == text_after("hello", 40)
    assert [chunk.finish_reason is not None for chunk in bucket.chunks] == [False] * 39 + [True]


async def test_a_full_sink_parks_its_request_until_it_is_resumed() -> None:
    """A full sink gets a few more chunks and then none, whatever time passes; resumed, it gets the rest."""
    bucket, other = Bucket(room=5), Bucket()
    async with fake_engine() as (engine, _):
        generation = engine.start(ask("slow"), bucket)
        await until(lambda: generation.is_parked)
        engine.start(ask("quick"), other)
        await until(lambda: other.is_closed)
        held = len(bucket.chunks)
        assert 5 <= held <= 9
        assert (await engine.status()).requests.parked == 1
        bucket.room = 1000
        engine.resume(generation)
        await until(lambda: bucket.is_closed)
        engine.resume(generation)  # of no effect
    assert bucket.text == text_after("slow", 40)


async def test_an_abandoned_sink_is_closed_and_gets_nothing_more() -> None:
    """Abandoning frees the pages at once; doing it again, or after the end, changes nothing."""
    bucket = Bucket()
    async with fake_engine() as (engine, _):
        generation = engine.start(ask("x"), bucket)
        await until(lambda: len(bucket.chunks) > 3)
        engine.abandon(generation)
        assert bucket.is_closed
        assert (await engine.status()).pages.active == 0
        engine.abandon(generation)
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)
        assert (await engine.status()).requests.cancelled == 1


async def test_an_error_is_the_last_thing_a_sink_gets() -> None:
    """NaN in the second step: the error, then the end."""
    bucket = Bucket()
    async with fake_engine(nan_requests={RequestId("bad")}) as (engine, _):
        engine.start(ask("x", id="bad"), bucket)
        await until(lambda: bucket.is_closed)
    assert isinstance(bucket.error, BackendError)


async def test_a_request_that_is_refused_leaves_its_sink_alone() -> None:
    """What is not admitted is an exception, and nothing is put or closed."""
    bucket = Bucket()
    config = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with fake_engine(config, step_s=0.01) as (engine, _):
        taken = [engine.start(ask(f"{n}"), Bucket()) for n in range(2)]
        with pytest.raises(ResourceExhausted):
            engine.start(ask("x"), bucket)
        for generation in taken:
            engine.abandon(generation)
    assert (bucket.chunks, bucket.error, bucket.is_closed) == ([], None, False)
