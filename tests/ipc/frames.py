"""Frames that mean harm, and the valid ones that they hide among, drawn from a seeded Random: quick enough for millions."""

import struct
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec

from ferrum_rt.ipc.framing import MAX_FRAME_BYTES, encode
from ferrum_rt.ipc.messages import (
    Accepted,
    Cancel,
    Chunks,
    ClientMessage,
    Credit,
    EndSession,
    Finished,
    ForkSession,
    Goodbye,
    Hello,
    Query,
    Submit,
    WireCall,
    WireChatMessage,
    WireRequest,
    WireSampling,
)

_U64 = 2**64 - 1
_FULL = MAX_FRAME_BYTES - 5


def packed(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def frame(body: bytes, length: int | None = None) -> bytes:
    """``length`` is what its header says, if not the truth."""
    return (len(body) if length is None else length).to_bytes(4, "little") + body


def deep(levels: int, level: bytes = b"\x91") -> bytes:
    """Arrays in arrays."""
    return level * levels + b"\xc0"


def message_with(message: ClientMessage, key: str, value: bytes) -> bytes:
    """The message as a frame, where ``value``, msgpack already, stands under ``key``: ``request.sampling.n`` goes too."""
    fields = _builtins(message)
    *path, last = key.split(".")
    inner = fields
    for name in path:
        inner = inner.setdefault(name, {})
    inner[last] = msgspec.Raw(value)
    return frame(packed(fields))


_COLLECTIONS: tuple[Any, ...] = ([], {}, [[]], {"a": 1}, [1, "a", None], {1: 2.0}, [""] * 100, {"": ""})
# Values that some field does not take, or that it takes and should not be trusted for: msgpack.
ODD: tuple[bytes, ...] = (
    *(packed(value) for value in (None, True, 0, -1, 2**31, 2**32, 2**63, _U64, -(2**63), 3.0, -0.0, 1e308, 5e-324)),
    *(packed(float(name)) for name in ("nan", "inf", "-inf")),
    *(packed(text) for text in ("", "a", "\x00", "\x1b[2J", "é" * 256, "a" * 257, "\ufeff\u202e", "a" * 5000)),
    b"\xa2\xff\xfe",  # no UTF-8
    b"\xa3\xed\xa0\x80",  # a lone surrogate
    b"\xa2\xc0\x80",  # NUL in two bytes
    *(packed(data) for data in (b"", b"abc", b"abcd", b"\xff" * 400)),
    *(packed(value) for value in _COLLECTIONS),
    b"\xc1",  # the code that msgpack never uses
    b"\xd4\x05\x00",  # ext of type 5
    b"\xd6\xff\x00\x00\x00\x00",  # a timestamp of 32 bits
    b"\xd7\xff" + b"\xff" * 8,  # one of 64, with too many nanoseconds
    b"\xc7\x0c\xff" + b"\xff" * 12,  # one of 96
    b"\xc7\x00\xff",  # one of none
    b"\x82\xa1a\x01\xa1a\x02",  # a key twice
    b"\x81\x91\x01\x02",  # a key that is an array
    b"\x81\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00\x01",  # one that is NaN
    *(code + b"\xff\xff\xff\xff" for code in (b"\xdd", b"\xdf", b"\xdb", b"\xc6")),  # four billion entries are promised
    b"\xc9\xff\xff\xff\xff\x05",
    *(deep(levels) for levels in (1, 20, 2000)),
    deep(2000, b"\x81\xa1a"),
    deep(300, b"\xc7\xff\x01"),
    b"\xdc\x07\xd0" + b"\x90" * 2000,
    b"\xdc\x07\xd0" + b"\x80" * 2000,
    b"\xdc\x07\xd0" + b"\xa0" * 2000,
)

# What a decoder takes and a daemon should refuse: fields of a request, or of its sampling.
_NAN, _INF = float("nan"), float("inf")
_ODD_SAMPLING: dict[str, tuple[Any, ...]] = {
    "max_tokens": (0, -1, _U64, 2**31 - 1, 1024),
    "min_tokens": (-1, 2**31 - 1, _U64),
    "temperature": (-1.0, _NAN, _INF, -0.0, 1e308),
    "top_p": (0.0, -0.0, 1.5, _NAN),
    "top_k": (-1, _U64),
    "min_p": (2.0, _NAN, -_INF),
    "typical_p": (0.0, _NAN),
    "repetition_penalty": (0.0, -0.0, _INF),
    "presence_penalty": (3.0, _NAN),
    "frequency_penalty": (-_INF,),
    "logit_bias": ({}, {-1: 0.0}, {2**63: 1.0}, {1: _NAN}, {257: 1.0}, dict.fromkeys(range(1000), 0.0)),
    "stop": ([""], ["x" * 1025], ["\x00"], [" "] * 64, ["aaaaaaab"] * 64),
    "stop_token_ids": ([-1], [_U64], [257], list(range(257))),
    "seed": (-1, 2**63, _U64, 2**63 - 1),
    "n": (0, -1, 129, _U64, 64),
    "logprobs": (-1, 21, _U64, 20),
    "prompt_logprobs": (-1, 21, 0, 5, 20),
    "allowed_token_ids": (b"", b"\x01", b"\xff\xff\xff\xff", b"\x01\x01\x00\x00", b"\x20\x00\x00\x00"),
    "bad_words": ([""], ["x" * 2000], ["a"]),
    "response_format": (
        *(("json_object", None), ("json_schema", "{"), ("json_schema", '{"a":' * 5000), ("regex", "(" * 5000), ("", None)),
        *(("grammar", 'start: "a"'), ("text", "x"), ("regex", None)),
    ),
    "mirostat": ((_NAN, _NAN), (0.0, 0.0), (5.0, 0.1)),
    "skip_special_tokens": (False,),
    "include_stop": (True,),
    "ignore_eos": (True,),
}
_ODD_REQUEST: dict[str, tuple[Any, ...]] = {
    "text": ("", None, "\x00", "é\U0010ffff<eos>", "x" * 1023, "x" * 1024, "x" * 3000),
    "token_ids": (b"", b"\x01", b"\xff\xff\xff\xff", b"\x01\x01\x00\x00"),
    "messages": (
        [],
        [WireChatMessage(role="user", content="hello")],
        [WireChatMessage(role="<eos>", content="")],
        [WireChatMessage(role="a", tool_calls=[WireCall(id="", name="", arguments="{")] * 128)],
        [WireChatMessage(role="user")] * 2000,
    ),
    "model_id": ("", "other", "\n"),
    "client_id": ("", "a" * 256, "\n", "../..", "\u202e"),
    "session_id": ("", "s", "\x7f"),
    "priority": (-1, 4, _U64, 0, 3),
    "deadline_s": (0.0, -1.0, _NAN, _INF, 1e-9, 0.001, 1e300),
    "metadata": ({"": ""}, {"a": "\x00"}, {f"{n}": "x" for n in range(64)}),
    "tools": (
        "[",
        "[" * 10_000,
        "{}",
        "1e999",
        '[{"function":{"name":"f","parameters":{"\\ud800":1}}}]',
        "[" + "9" * 5000 + "]",
    ),
    "tool_choice": ('"required"', '"\\ud800"', '{"function":{"name":"\\ud800"}}', "nul", "[" * 10_000, '{"a":' * 5000),
    "parse_special_tokens": (True,),
}
_ODD_IDS = ("a" * 256, "é" * 256, "\x00", "\n", "\u202e", "1/2", "never was")
_ODD_CREDITS = (0, 1, 7, 10**6, 2**31, 2**63, _U64)
_ODD_NUMBERS = (*_ODD_CREDITS, -1, -(2**63))
_KINDS: Any = ("status", "metrics", "health", "arrivals", "diagnostics")
SESSIONS = ("s", "t", "u")
_WORDS = ("def ", "x", "hello", "import os\n", "é", "<eos>", " ", "0123456789" * 8)


def right_submit(rng: Random, request_id: str) -> Submit:
    """A request that a daemon over the fake executor carries out, whatever else it has to do."""
    text = rng.choice(_WORDS) + str(rng.randrange(1000))
    prompt: dict[str, Any] = {"text": text}
    if (form := rng.random()) < 0.1:
        prompt = {"token_ids": b"".join(code.to_bytes(4, "little") for code in text.encode())}
    elif form < 0.2:
        prompt = {"messages": [WireChatMessage(role="user", content=text)]}
    sampling: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 5, 17, 40))}
    if rng.random() < 0.2:
        sampling["n"] = rng.choice((2, 3))
    if rng.random() < 0.2:
        sampling["stop"] = [chr(rng.randrange(33, 127)) for _ in range(rng.choice((1, 5)))]
    if rng.random() < 0.1:
        sampling |= {"seed": rng.getrandbits(63), "temperature": rng.random(), "logprobs": 3, "stop_token_ids": [65]}
    return Submit(
        request_id=request_id,
        request=WireRequest(
            **prompt,
            sampling=WireSampling(**sampling),
            priority=rng.randrange(4),
            session_id=rng.choice(SESSIONS) if rng.random() < 0.3 else None,
        ),
        credit=1000,
    )


def odd_submit(rng: Random, request_id: str) -> Submit:
    """One that a decoder takes, with a few fields that are wrong, or strange."""
    sampling: dict[str, Any] = {"max_tokens": 5}
    request: dict[str, Any] = {"text": "x"}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        table, fields = rng.choice(((_ODD_SAMPLING, sampling), (_ODD_REQUEST, request)))
        name = rng.choice(tuple(table))
        fields[name] = rng.choice(table[name])
        if name in ("token_ids", "messages") and rng.random() < 0.8:
            request["text"] = None
    sampling["max_tokens"] = min(sampling["max_tokens"], 1024) if rng.random() < 0.9 else sampling["max_tokens"]
    wire = WireRequest(**request, sampling=WireSampling(**sampling))
    return Submit(request_id=request_id, request=wire, credit=rng.choice((1000, 1000, *_ODD_CREDITS)))


def session_message(rng: Random, query_id: int) -> EndSession | ForkSession:
    """One that right_submit's requests give something to do."""
    name, client_id = rng.choice(SESSIONS), rng.choice(("default", "other"))
    if rng.random() < 0.5:
        return EndSession(query_id=query_id, session_id=name, client_id=client_id)
    return ForkSession(query_id=query_id, session_id=name, new_session_id=rng.choice(SESSIONS), client_id=client_id)


def odd_session_message(rng: Random) -> EndSession | ForkSession:
    """With names that the decoder takes, and the daemon mostly does not."""
    odd = {
        "query_id": rng.choice(_ODD_NUMBERS),
        "session_id": rng.choice((*SESSIONS, *_ODD_IDS)),
        "client_id": rng.choice(("default", *_ODD_REQUEST["client_id"])),
    }
    if rng.random() < 0.5:
        return EndSession(**odd)
    return ForkSession(new_session_id=rng.choice((*SESSIONS, *_ODD_IDS)), **odd)


def odd_message(rng: Random, ids: tuple[str, ...]) -> ClientMessage:
    """Any that a decoder takes; ``ids`` are those in use, or that were."""
    request_id = rng.choice((*ids, *_ODD_IDS)) if ids else rng.choice(_ODD_IDS)
    match rng.randrange(11):
        case 0 | 1 | 2 | 3:
            return odd_submit(rng, rng.choice((f"{rng.getrandbits(40):x}", request_id)))
        case 4 | 5:
            return Credit(request_id=request_id, chunks=rng.choice(_ODD_CREDITS))
        case 6 | 7:
            return Cancel(request_id=request_id)
        case 8:
            return Query(query_id=rng.choice(_ODD_NUMBERS), kind=rng.choice(_KINDS))
        case 9:
            return odd_session_message(rng)
        case _:
            return rng.choice((Goodbye(), Hello(version=1), Hello(version=rng.choice(_ODD_NUMBERS))))


def any_message(rng: Random) -> ClientMessage:
    """One of any type, for a mutation to begin with."""
    match rng.randrange(4):
        case 0:
            return Hello(version=1, client="fuzz", trace={"traceparent": "00-ab-cd-01"})
        case 1:
            return right_submit(rng, "a")
        case _:
            return odd_message(rng, ("a",))


def broken_frame(rng: Random) -> bytes:
    """Bytes that were a valid frame before something happened to them; now and then they still are one."""
    return rng.choice(_MUTATIONS)(rng, encode(any_message(rng)))


def _flip(rng: Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _flip_body(rng: Random, data: bytes) -> bytes:
    return data[:4] + _flip(rng, data[4:])


def _truncate(rng: Random, data: bytes) -> bytes:
    return frame(data[4 : rng.randrange(4, len(data))])


def _break_off(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _splice(rng: Random, data: bytes) -> bytes:
    other = encode(any_message(rng))
    return frame(data[4 : rng.randrange(4, len(data))] + other[rng.randrange(4, len(other)) :])


def _insert(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(4, len(data) + 1)
    return frame(data[4:at] + rng.choice((rng.choice(ODD), rng.randbytes(rng.randrange(1, 20)), data[4:])) + data[at:])


def _delete(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(4, len(data))
    return frame(data[4:at] + data[at + rng.randrange(1, 20) :])


def _wrong_length(rng: Random, data: bytes) -> bytes:
    length = len(data) - 4
    lengths = (0, 1, length - 1, length + 1, length * 2, MAX_FRAME_BYTES, MAX_FRAME_BYTES + 1, 2**31, 2**32 - 1)
    return frame(data[4:], rng.choice(lengths))


def _odd_value(rng: Random, data: bytes) -> bytes:
    """In place of one of its values, at any depth, or under a key that it has not; the type is left alone mostly."""
    fields = msgspec.msgpack.decode(data[4:], strict=False)
    places: list[tuple[Any, Any]] = []
    level: list[Any] = [fields]
    while level:
        inner = level.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        places += [(inner, key) for key in keys if key != "type" or rng.random() < 0.1]
        level += [inner[key] for key in keys if isinstance(inner[key], dict | list)]
        if isinstance(inner, dict) and rng.random() < 0.1:
            places.append((inner, rng.choice(("unknown", "x" * 300, "request_id", "text", "trace"))))
    if places:
        inner, key = rng.choice(places)
        inner[key] = msgspec.Raw(rng.choice(ODD))
    return frame(packed(fields))


def _reorder(rng: Random, data: bytes) -> bytes:
    """The type comes later, or twice, or is another's."""
    fields = msgspec.msgpack.decode(data[4:], strict=False)
    pairs = [(packed(key), packed(value)) for key, value in fields.items()]
    kinds = (
        *("hello", "submit", "credit", "cancel", "query", "goodbye", "end_session", "fork_session"),
        *("chunks", "welcome", "refused", "", "HELLO", "submit\x00"),
    )
    match rng.randrange(4):
        case 0:
            rng.shuffle(pairs)
        case 1:
            pairs.append(rng.choice(pairs))
        case 2:
            pairs[0] = (pairs[0][0], packed(rng.choice(kinds)))
        case _:
            pairs.append((packed("type"), packed(rng.choice(kinds))))
    header = bytes([0x80 | min(len(pairs), 15)])
    if rng.random() < 0.2:
        header = rng.choice((b"\xde" + len(pairs).to_bytes(2, "big"), b"\x8f", b"\x80", b"\x9f", b"\xdf\xff\xff\xff\xff"))
    return frame(header + b"".join(key + value for key, value in pairs))


def _noise(rng: Random, data: bytes) -> bytes:
    body = rng.randbytes(rng.randrange(0, 64))
    return rng.choice((body or b"\x00", frame(body), frame(b"\x82\xa4type" + body)))


def _attack(rng: Random, data: bytes) -> bytes:
    return rng.choice(tuple(ATTACKS.values()))


_MUTATIONS: tuple[Callable[[Random, bytes], bytes], ...] = (
    *(_flip, _flip_body, _truncate, _break_off, _splice, _insert, _delete, _wrong_length),
    *(_odd_value, _odd_value, _odd_value, _reorder, _noise, _attack),
)


def _builtins(message: ClientMessage) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return fields


_HELLO = Hello(version=1, client="attack")
_SUBMIT = Submit(request_id="a", request=WireRequest(text="x", sampling=WireSampling(max_tokens=900)), credit=1000)
_CREDIT = Credit(request_id="a", chunks=1)

# What ends a connection that has been greeted, each under 1 KB.
ATTACKS: dict[str, bytes] = {
    "length of 2 GiB": frame(b"", 2**31),
    "length of 0xFFFFFFFF": frame(b"", 2**32 - 1),
    "length one too long": frame(b"", MAX_FRAME_BYTES + 1),
    "length too short": frame(encode(_CREDIT)[4:], len(encode(_CREDIT)) - 5),
    "empty frame": frame(b""),
    "array for a message": frame(packed(["goodbye"])),
    "int for a message": frame(packed(1)),
    "map header of 16 bits": frame(b"\xde\x00\x01" + packed("type") + packed("goodbye")),
    "first key is not type": frame(packed({"request_id": "a", "type": "cancel"})),
    "message of the other side": encode(Accepted(request_id="a")),
    "welcome from a client": frame(packed({"type": "welcome", "version": 1})),
    "chunks from a client": encode(Chunks(chunks=[])),
    "finished from a client": encode(Finished(request_id="a", queue_s=0.0, ttft_s=0.0, total_s=0.0)),
    "type is nil": frame(packed({"type": None})),
    "type is empty": frame(packed({"type": ""})),
    "type with NUL": frame(packed({"type": "goodbye\x00"})),
    "type twice": frame(b"\x82" + (packed("type") + packed("goodbye")) + packed("type") + packed("hello")),
    "bytes behind the message": frame(packed({"type": "goodbye"}) + b"\xc0"),
    "unknown key": frame(packed({"type": "goodbye", "why": 1})),
    "unknown key of 300 characters": frame(packed({"type": "goodbye", "x" * 300: 1})),
    "missing key": frame(packed({"type": "credit", "request_id": "a"})),
    "second hello": encode(_HELLO),
    "id in use": encode(_SUBMIT) + encode(_SUBMIT),
    "id of 257 characters": message_with(_SUBMIT, "request_id", packed("a" * 257)),
    "empty id": encode(msgspec.structs.replace(_SUBMIT, request_id="")),
    "id is bin": message_with(_SUBMIT, "request_id", packed(b"a")),
    "id is no UTF-8": message_with(_SUBMIT, "request_id", b"\xa2\xff\xfe"),
    "id is a lone surrogate": message_with(_SUBMIT, "request_id", b"\xa3\xed\xa0\x80"),
    "id is ext": message_with(_SUBMIT, "request_id", b"\xd4\x05\x00"),
    "id is a timestamp": message_with(_SUBMIT, "request_id", b"\xd6\xff\x00\x00\x00\x00"),
    "negative credit": encode(Credit(request_id="a", chunks=-1)),
    "credit is a float": message_with(_CREDIT, "chunks", packed(1.5)),
    "credit is NaN": message_with(_CREDIT, "chunks", packed(_NAN)),
    "credit is Infinity": message_with(_CREDIT, "chunks", packed(_INF)),
    "credit is true": message_with(_CREDIT, "chunks", packed(True)),
    "query of an unknown kind": frame(packed({"type": "query", "query_id": 1, "kind": "shutdown"})),
    "array of 4 billion": message_with(_SUBMIT, "request.messages", b"\xdd\xff\xff\xff\xff"),
    "map of 4 billion": message_with(_SUBMIT, "request.metadata", b"\xdf\xff\xff\xff\xff"),
    "text of 4 billion": message_with(_SUBMIT, "request.text", b"\xdb\xff\xff\xff\xff"),
    "bytes of 4 billion": message_with(_SUBMIT, "request.token_ids", b"\xc6\xff\xff\xff\xff"),
    "deep 200": message_with(_SUBMIT, "request.messages", deep(200)),
    "reserved code": message_with(_SUBMIT, "request.text", b"\xc1"),
    "trace of 9": message_with(_SUBMIT, "trace", packed({f"{n}": "" for n in range(9)})),
    "65 stop strings": message_with(_SUBMIT, "request.sampling.stop", packed(["x"] * 65)),
}


def large_attacks() -> dict[str, bytes]:
    """More of what ends a connection, too large to be kept. The depth stands wherever a value can."""
    nested, maps = deep(100_000), deep(100_000, b"\x81\xa1a")
    attacks = {
        "100,000 arrays deep": frame(nested),
        "100,000 maps deep": frame(maps),
        "100,000 deep before the type": frame(b"\x82" + packed("x") + nested + packed("type") + packed("goodbye")),
        "100,000 deep as the type": frame(b"\x81\xa4type" + nested),
        "100,000 deep as a key": frame(b"\x82\xa4type\xa7goodbye" + nested),
        "100,000 deep in an unknown field": frame(b"\x82\xa4type\xa7goodbye" + packed("x") + nested),
        "4 MiB of empty arrays": frame(b"\xdd" + struct.pack(">I", _FULL) + b"\x90" * _FULL),
        "4 MiB of empty maps": frame(b"\xdd" + struct.pack(">I", _FULL) + b"\x80" * _FULL),
        "4 MiB of empty strings": frame(b"\xdd" + struct.pack(">I", _FULL) + b"\xa0" * _FULL),
    }
    for place in ("request_id", "credit", "trace", "request", "request.text", "request.token_ids", "request.messages"):
        attacks[f"100,000 arrays deep in {place}"] = message_with(_SUBMIT, place, nested)
        attacks[f"100,000 maps deep in {place}"] = message_with(_SUBMIT, place, maps)
    for field in WireRequest.__struct_fields__ + tuple(f"sampling.{name}" for name in WireSampling.__struct_fields__):
        if field not in ("text", "token_ids", "messages"):
            attacks[f"100,000 arrays deep in request.{field}"] = message_with(_SUBMIT, f"request.{field}", nested)
    many = b"\xdd" + struct.pack(">I", 4_000_000)
    for name, place in (("messages", "request.messages"), ("stop strings", "request.sampling.stop")):
        for kind, item in (("arrays", b"\x90"), ("maps", b"\x80"), ("strings", b"\xa0")):
            attacks[f"4 million empty {kind} as {name}"] = message_with(_SUBMIT, place, many + item * 4_000_000)
    biases = (
        b"\xdf" + struct.pack(">I", 600_000) + b"".join(b"\xce%b\x00" % struct.pack(">I", n << 3) for n in range(600_000))
    )
    attacks["600,000 biases"] = message_with(_SUBMIT, "request.sampling.logit_bias", biases)
    return attacks
