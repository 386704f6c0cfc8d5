"""Messages to bytes and back: a length of four bytes, little-endian, then one message in msgpack."""

from collections.abc import Generator
from typing import Generic, TypeVar

import msgspec

from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.ipc.messages import ClientMessage, ServerMessage

T = TypeVar("T")

MAX_FRAME_BYTES = 4 * 1024 * 1024
_HEADER_BYTES = 4
# A map of up to 15 entries whose first key is "type". Were it to come later, a decoder would have to skip what is before it,
# of whatever depth.
_FIRST_KEY = b"\xa4type"

_ENCODER = msgspec.msgpack.Encoder()
_OF_CLIENTS: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_OF_SERVERS: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: ClientMessage | ServerMessage) -> bytes:
    """One frame. Raises InvalidFormat for a message that is too long for one, or has text that is none."""
    try:
        body = _ENCODER.encode(message)
    except UnicodeEncodeError as error:
        raise InvalidFormat(f"the message has text that is not valid Unicode: {error.reason}") from None
    if len(body) > MAX_FRAME_BYTES:
        raise InvalidFormat(f"the message has {len(body)} bytes; a frame takes at most {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


class FrameDecoder(Generic[T]):
    """Puts the messages together that come in pieces. It holds one unfinished frame at most, and takes no room for bytes
    that a length only promises."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T], max_frame_bytes: int) -> None:
        self._decoder, self._max_frame_bytes = decoder, max_frame_bytes
        self._held = bytearray()
        self.message_bytes = 0
        """The length of the message that was given out last."""

    @property
    def num_held_bytes(self) -> int:
        """Of a frame that is not complete, and of frames that nobody has asked for yet."""
        return len(self._held)

    def feed(self, data: bytes) -> Generator[T, None, None]:
        """The messages that ``data`` completes, one by one: those before a wrong one still come. Raises InvalidFormat; then
        the stream is lost, for nobody knows where the next frame begins. Run or close it before the next call, which
        goes on with what it had not come to."""
        self._held += data
        start = 0
        try:
            while (length := self._next_length(start)) is not None:
                body = memoryview(self._held)[start + _HEADER_BYTES : start + _HEADER_BYTES + length]
                start += _HEADER_BYTES + length
                self.message_bytes = length
                try:
                    message = self._decode(body)
                finally:
                    body.release()
                yield message
        finally:
            del self._held[:start]

    def clear(self) -> None:
        """Forget what is held."""
        self._held.clear()

    def _next_length(self, start: int) -> int | None:
        """Bytes in the frame at ``start``, if it is all here."""
        available = len(self._held) - start
        if available < _HEADER_BYTES:
            return None
        length = int.from_bytes(self._held[start : start + _HEADER_BYTES], "little")
        if length > self._max_frame_bytes:
            raise InvalidFormat(f"a frame of {length} bytes was announced; at most {self._max_frame_bytes} are taken")
        return length if available >= _HEADER_BYTES + length else None

    def _decode(self, body: memoryview) -> T:
        if body[1 : 1 + len(_FIRST_KEY)] != _FIRST_KEY:
            raise InvalidFormat("a message must be a map of few entries whose first key is 'type'")
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidFormat(f"not a message of protocol version 1: {error}") from None  # it has all of the bytes


def client_decoder(max_frame_bytes: int = MAX_FRAME_BYTES) -> FrameDecoder[ClientMessage]:
    """What the daemon reads with."""
    return FrameDecoder(_OF_CLIENTS, max_frame_bytes)


def server_decoder(max_frame_bytes: int = MAX_FRAME_BYTES) -> FrameDecoder[ServerMessage]:
    """What a client reads with."""
    return FrameDecoder(_OF_SERVERS, max_frame_bytes)
