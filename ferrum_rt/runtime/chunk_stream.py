"""A request's chunks on their way to a reader in this process."""

from collections.abc import Callable

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.types import StreamChunk

# Chunks of each output that can still come after a request was parked: of the steps in flight, committed and on their way.
_SLACK = 8


class ChunkStream:
    """The ChunkSink that is read with ``async for``. It is full with ``capacity`` chunks for each output unread; when it has
    been read down to half of that, ``on_room`` is called."""

    def __init__(self, num_outputs: int, capacity: int, on_room: Callable[[], None]) -> None:
        self._capacity = capacity * num_outputs
        self._on_room = on_room
        self._was_full = False
        self._send: MemoryObjectSendStream[StreamChunk | FerrumError]
        self._receive: MemoryObjectReceiveStream[StreamChunk | FerrumError]
        self._send, self._receive = anyio.create_memory_object_stream((capacity + _SLACK) * num_outputs)

    @property
    def is_full(self) -> bool:
        self._was_full |= self._send.statistics().current_buffer_used >= self._capacity
        return self._was_full

    def put(self, item: StreamChunk | FerrumError) -> None:
        self._send.send_nowait(item)

    def close(self) -> None:
        """Whatever the reader has not taken yet stays for it."""
        self._send.close()

    def abandon(self) -> None:
        """Nobody reads any more."""
        self._send.close()
        self._receive.close()
        self._on_room = _nothing  # it knows of the generation, which knows of this

    def __aiter__(self) -> "ChunkStream":
        return self

    async def __anext__(self) -> StreamChunk:
        try:
            item = await self._receive.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if self._was_full and self._receive.statistics().current_buffer_used <= self._capacity // 2:
            self._was_full = False
            self._on_room()
        if isinstance(item, FerrumError):
            raise item
        return item


def _nothing() -> None:
    pass
