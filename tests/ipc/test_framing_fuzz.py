"""The decoder against whatever bytes come, in whatever pieces."""

import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.ipc.framing import FrameDecoder, client_decoder, encode, server_decoder
from ferrum_rt.ipc.messages import Submit, WireRequest
from tests.ipc.frames import ATTACKS, broken_frame, frame, large_attacks, odd_message, right_submit
from tests.ipc.strategies import client_messages, server_messages

DECODERS: list[Callable[..., FrameDecoder[Any]]] = [client_decoder, server_decoder]

# Valid frames, frames that were, and noise: a message comes through about every second time.
frames = st.one_of(
    (client_messages | server_messages).map(encode),
    st.randoms(use_true_random=False).map(broken_frame),
    st.binary(max_size=60).map(lambda body: frame(b"\x82\xa4type" + body)),
    st.binary(max_size=60),
)
streams = st.lists(frames, max_size=6).map(lambda parts: b"".join(parts)[:5000])
lots = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


def read(decoder: FrameDecoder[Any], parts: list[bytes]) -> tuple[list[bytes], str]:
    """The messages, as frames (for NaN equals nothing), and why no more came after them."""
    found: list[bytes] = []
    try:
        for part in parts:
            found.extend(map(encode, decoder.feed(part)))
    except InvalidFormat as error:
        return found, str(error)
    return found, "unfinished" if decoder.num_held_bytes else ""


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
@lots
@given(data=streams, cuts=st.lists(st.integers(0, 3000), max_size=30), bytewise=st.booleans())
@example(data=frame(b""), cuts=[], bytewise=True)
def test_the_pieces_change_nothing(
    decoder: Callable[[], FrameDecoder[Any]], data: bytes, cuts: list[int], bytewise: bool
) -> None:
    """However a stream is cut, the same messages come and the same verdict, which is a message or InvalidFormat."""
    places = list(range(len(data))) if bytewise else cuts
    assert read(decoder(), pieces(data, places)) == read(decoder(), [data])


@pytest.mark.slow
@lots
@given(message=client_messages)
def test_what_a_client_says_comes_back(message: Any) -> None:
    """Any message of a client, of whatever fields and values, is the same once it was encoded and fed."""
    assert read(client_decoder(), [encode(message)]) == ([encode(message)], "")
    if "nan" not in repr(message):
        assert list(client_decoder().feed(encode(message))) == [message]


@pytest.mark.slow
@lots
@given(message=server_messages)
def test_what_a_daemon_says_comes_back(message: Any) -> None:
    """Any message of a daemon likewise."""
    assert read(server_decoder(), [encode(message)]) == ([encode(message)], "")


def unfinished(data: bytes) -> list[int]:
    """After each byte of a stream of whole frames: the bytes since the last one ended."""
    counts, start = list[int](), 0
    while start < len(data):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        counts += [*range(1, end - start), 0]
        start = end
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 3_000, 300_000])
def test_no_more_is_held_than_the_frame_that_is_not_finished(size: int) -> None:
    """Between pieces that end anywhere a decoder keeps the bytes of one unfinished frame, twice at most."""
    rng, reader = Random(size), client_decoder()
    texts = ["x" * rng.randrange(size) for _ in range(60)]
    data = b"".join(encode(Submit(request_id="a", request=WireRequest(text=text), credit=1)) for text in texts)
    cuts = sorted(rng.randrange(len(data)) for _ in range(200))
    parts, bounds, fed = pieces(data, cuts), unfinished(data), 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for part in parts:
            for message in reader.feed(part):
                del message
            fed += len(part)
            held = tracemalloc.get_traced_memory()[0] - before
            assert held <= 2 * bounds[fed - 1] + 4096
            assert (reader.num_held_bytes == 0) is (bounds[fed - 1] == 0)
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_long_stream_leaves_nothing_behind() -> None:
    """20,000 frames in pieces that end anywhere need the memory of a few."""
    rng, reader, count = Random(1), client_decoder(), 0
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            data = b"".join(encode(right_submit(rng, "a")) for _ in range(100))
            cut = rng.randrange(len(data))
            for part in (data[:cut], data[cut:]):
                count += sum(1 for _ in reader.feed(part))
        del data, part
        assert tracemalloc.get_traced_memory()[0] - before < 50_000
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert not reader.num_held_bytes


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_invalid_or_left_to_the_daemon(name: str) -> None:
    """What a decoder can know to be wrong it says; the rest is for the daemon to refuse, and is a message to the decoder."""
    _, verdict = read(client_decoder(), [ATTACKS[name]])
    left = ("second hello", "id in use")
    assert bool(verdict) is (name not in left)
    assert verdict != "unfinished"


@pytest.mark.slow
def test_large_attacks_are_invalid_in_either_direction() -> None:
    """Depth in every field, millions of nothings: InvalidFormat in memory that their own bytes bound."""
    for name, data in large_attacks().items():
        for decoder in DECODERS:
            reader = decoder()
            tracemalloc.start()
            try:
                with pytest.raises(InvalidFormat):
                    list(reader.feed(data))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak < 1_000_000 + 4 * len(data), name


@pytest.mark.slow
def test_many_mutations() -> None:
    """A quick seeded run over many more frames than the rest: nothing but InvalidFormat, and every type of message among
    what comes through."""
    rng, kinds = Random(7), set[str]()
    for _ in range(20_000):
        data = broken_frame(rng) if rng.random() < 0.8 else encode(odd_message(rng, ("a",)))
        for decoder in DECODERS:
            with suppress(InvalidFormat):
                kinds |= {type(message).__name__ for message in decoder().feed(data)}
    assert kinds >= {"Hello", "Submit", "Credit", "Cancel", "Query", "Goodbye", "EndSession", "ForkSession"}
