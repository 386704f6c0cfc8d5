"""What is on its way to a client: the chunks that one step brings for a connection leave in one frame, written once."""

import asyncio
from collections.abc import Callable

from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.interfaces.types import StreamChunk
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Chunks, ServerMessage

# A write that waits takes uvloop a kilobyte, however short it is.
_WRITE_BUFFER_BYTES = 4 * 1024


class Outbox:
    """Messages leave in their order, in the loop's next turn. ``on_flush`` is called when some have; ``on_fault``, instead,
    for one that no frame takes."""

    def __init__(self, on_flush: Callable[[], None], on_fault: Callable[[InvalidFormat], None]) -> None:
        self._on_flush, self._on_fault = on_flush, on_fault
        self._messages: list[ServerMessage] = []
        self._chunks: list[StreamChunk] = []
        """Of the last of the messages, if that is Chunks."""
        self._backlog = bytearray()
        """Frames that the transport does not take for now."""
        self._is_flush_due = self._is_paused = False
        self._planned_flush: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self.num_written = 0

    def open(self, transport: asyncio.Transport) -> None:
        """From here on it can write."""
        transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._transport = transport

    @property
    def num_waiting_bytes(self) -> int:
        """That were written, and that the kernel has not taken."""
        return self._transport.get_write_buffer_size() + len(self._backlog)

    def send(self, message: ServerMessage) -> None:
        """Behind what is on its way."""
        self._messages.append(message)
        self._flush_soon()

    def send_within(self, limit_s: float, message: ServerMessage) -> None:
        """What would only wake the client: what it waits for often follows at once."""
        self._messages.append(message)
        if not (self._is_flush_due or self._planned_flush):
            self._planned_flush = self._loop.call_later(limit_s, self._flush)

    def send_chunk(self, chunk: StreamChunk) -> None:
        """With what else the step brings."""
        if not self._chunks:
            self.send(Chunks(chunks=self._chunks))
        self._chunks.append(chunk)

    def pause(self) -> None:
        """The transport has enough."""
        self._is_paused = True

    def resume(self) -> None:
        """It has room again."""
        self._is_paused = False
        if self._backlog:
            self._write(b"")

    def close(self) -> None:
        """What waits still goes out, if the client reads on. Nothing is taken any more."""
        if waiting := bytes(self._backlog) + self._take_frames():
            self._transport.write(waiting)
        self._backlog.clear()
        self._transport.close()

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._planned_flush is not None:
            self._planned_flush.cancel()
            self._planned_flush = None
        if self._transport.is_closing() or not self._messages:
            return
        try:
            self._write(self._take_frames())
        except InvalidFormat as error:
            self._on_fault(error)
        else:
            self._on_flush()

    def _write(self, frames: bytes) -> None:
        self.num_written += len(frames)
        if self._is_paused:
            self._backlog += frames
        elif self._backlog:
            self._transport.write(bytes(self._backlog) + frames)
            self._backlog.clear()
        else:
            self._transport.write(frames)

    def _take_frames(self) -> bytes:
        messages, self._messages, self._chunks = self._messages, [], []
        return b"".join(map(frames_of, messages))


def frames_of(message: ServerMessage) -> bytes:
    """One, unless chunks take more than a frame may. Raises InvalidFormat for a message that cannot be parted."""
    try:
        return encode(message)
    except InvalidFormat:
        if not isinstance(message, Chunks) or len(message.chunks) == 1:
            raise
        half = len(message.chunks) // 2
        return frames_of(Chunks(chunks=message.chunks[:half])) + frames_of(Chunks(chunks=message.chunks[half:]))
