"""Frames: whatever the pieces they come in, and whatever somebody sends who means harm."""

import time
import tracemalloc
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.interfaces.types import RequestId, StreamChunk, TokenId
from ferrum_rt.ipc.framing import MAX_FRAME_BYTES, FrameDecoder, client_decoder, encode, server_decoder
from ferrum_rt.ipc.messages import (
    Cancel,
    Chunks,
    ClientMessage,
    Credit,
    EndSession,
    ForkSession,
    Goodbye,
    Hello,
    Query,
    Submit,
    WireRequest,
)

MESSAGES: list[ClientMessage] = [
    Hello(version=1, client="test", trace={"traceparent": "00-ab-cd-01"}),
    Submit(request_id="a", request=WireRequest(text="def "), credit=8),
    Credit(request_id="a", chunks=3),
    Cancel(request_id="a"),
    Query(query_id=7, kind="status"),
    Goodbye(),
    EndSession(query_id=8, session_id="é"),
    ForkSession(query_id=9, session_id="a", new_session_id="b", client_id="c"),
]


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def deep(levels: int) -> bytes:
    """Arrays in arrays."""
    return b"\x91" * levels + b"\xc0"


def submit_with(key: str, value: bytes) -> bytes:
    """A Submit whose request has one more field."""
    request = b"\x82" + packed("text") + packed("x") + packed(key) + value
    fields = b"\x84" + packed("type") + packed("submit") + packed("request_id") + packed("a")
    return frame(fields + packed("credit") + packed(1) + packed("request") + request)


@settings(deadline=None)
@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.lists(st.integers(0, 400), max_size=20))
def test_messages_come_back_however_they_are_cut(messages: list[ClientMessage], cuts: list[int]) -> None:
    """Any messages, in pieces of any size, come back in order, each as soon as its last byte is there."""
    data, decoder = b"".join(map(encode, messages)), client_decoder()
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    found: list[ClientMessage] = []
    for start, end in pairwise(places):
        found += decoder.feed(data[start:end])
        complete = [n for n in range(len(messages) + 1) if len(b"".join(map(encode, messages[:n]))) <= end]
        assert len(found) == complete[-1]
    assert found == messages
    assert not decoder.num_held_bytes


def test_chunks_of_several_requests_share_a_frame() -> None:
    """What the daemon sends for one step is one frame of few bytes, and comes back equal."""
    chunks = [StreamChunk(request_id=RequestId(f"{n}"), text="é", token_ids=[TokenId(n)]) for n in range(3)]
    data = encode(Chunks(chunks=chunks))
    assert list(server_decoder().feed(data)) == [Chunks(chunks=chunks)]
    assert len(data) < 50 * len(chunks)


HOSTILE = {
    "a length of 2 GiB": (2**31).to_bytes(4, "little"),
    "a length of 4 GiB": b"\xff\xff\xff\xff",
    "one byte too long": (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
    "an empty frame": frame(b""),
    "no map": frame(packed([1, 2])),
    "a map without a type": frame(packed({"version": 1})),
    "an unknown type": frame(packed({"type": "helo", "version": 1})),
    "a message of the other side": encode(Chunks(chunks=[])),
    "an unknown field": frame(packed({"type": "goodbye", "reason": "x"})),
    "a missing field": frame(packed({"type": "credit", "request_id": "a"})),
    "a wrong type": frame(packed({"type": "credit", "request_id": "a", "chunks": "3"})),
    "a name that is too long": frame(packed({"type": "cancel", "request_id": "a" * 257})),
    "bytes behind the message": frame(packed({"type": "goodbye"}) + b"\x00"),
    "a message cut short": frame(packed({"type": "goodbye"})[:-1]),
    "text that is no UTF-8": frame(b"\x82\xa4type\xa6cancel\xaarequest_id\xa2\xff\xfe"),
    "100,000 arrays deep": frame(deep(100_000)),
    "100,000 maps deep": frame(b"\x81\xa1a" * 100_000 + b"\xc0"),
    "100,000 deep before the type": frame(b"\x82" + packed("x") + deep(100_000) + packed("type") + packed("goodbye")),
    "100,000 deep as the type": frame(b"\x81\xa4type" + deep(100_000)),
    "100,000 deep in an unknown field": frame(b"\x82\xa4type\xa7goodbye" + packed("x") + deep(100_000)),
    "100,000 deep in the metadata": submit_with("metadata", deep(100_000)),
    "100,000 deep in the tools": submit_with("tools", deep(100_000)),
    "100,000 deep in a message": submit_with("messages", deep(100_000)),
    "4 MiB of empty arrays": frame(b"\xdd" + (MAX_FRAME_BYTES - 5).to_bytes(4, "big") + b"\x90" * (MAX_FRAME_BYTES - 5)),
    "4 MiB of empty maps as messages": submit_with("messages", b"\xdd\x00\x3f\xff\x00" + b"\x80" * 0x3FFF00),
    "a million stop strings": submit_with("sampling", b"\x81\xa4stop\xdd\x00\x0f\x42\x40" + b"\xa0" * 1_000_000),
    "a million biases": submit_with("sampling", b"\x81\xaalogit_bias\xdf\x00\x0f\x42\x40" + b"\x01\x01" * 1_000_000),
    "an array of 4 billion": submit_with("messages", b"\xdd\xff\xff\xff\xff"),
    "a map of 4 billion": submit_with("metadata", b"\xdf\xff\xff\xff\xff"),
    "a text of 4 billion": submit_with("client_id", b"\xdb\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_invalid_at_once(data: bytes) -> None:
    """Each is InvalidFormat, in time and memory that its own bytes bound; the message before it still arrives."""
    decoder, found, before = client_decoder(), list[ClientMessage](), encode(MESSAGES[0])
    began = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFormat):
            found.extend(decoder.feed(before + data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == MESSAGES[:1]
    assert time.thread_time() - began < 0.5
    assert peak < 1_000_000 + 4 * len(data)


def test_a_promised_length_takes_no_memory() -> None:
    """A header that announces the largest frame is waited for without making room for it."""
    decoder = client_decoder()
    tracemalloc.start()
    assert list(decoder.feed(MAX_FRAME_BYTES.to_bytes(4, "little") + b"\x81")) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000
    assert decoder.num_held_bytes


def test_a_message_too_long_to_send_is_refused() -> None:
    """The sender finds out, not the receiver."""
    with pytest.raises(InvalidFormat, match="at most"):
        encode(Submit(request_id="a", request=WireRequest(text="x" * MAX_FRAME_BYTES), credit=1))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.builds(lambda body: frame(b"\x82\xa4type" + body), st.binary(max_size=100)))
def test_any_bytes_are_messages_or_invalid(data: bytes) -> None:
    """Random bytes never raise anything else."""
    decoder: FrameDecoder[ClientMessage] = client_decoder()
    try:
        for message in decoder.feed(data):
            assert isinstance(message, ClientMessage)
    except InvalidFormat:
        pass
