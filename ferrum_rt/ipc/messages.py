"""What client and daemon say to each other: version 1 of the protocol that docs/protocol.md describes.

Every message is a msgpack map whose first key is ``type``. No field has a free form: what does (a tool's parameters, a
JSON schema) travels as JSON text, and token ids as packed bytes. So a decoder never builds more than a few times the
bytes it was given, and never recurses deeper than these classes nest.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ferrum_rt.interfaces.types import StreamChunk

VERSION = 1
MAX_MESSAGES = 4096
"""Of a conversation, the tool calls in it counted too: each is checked on the daemon's event loop."""

Name = Annotated[str, Meta(max_length=256)]
RequestName = Annotated[str, Meta(min_length=1, max_length=256)]
NumChunks = Annotated[int, Meta(ge=0)]
TraceContext = Annotated[dict[Name, Annotated[str, Meta(max_length=4096)]], Meta(max_length=8)]
"""The W3C trace context, as OpenTelemetry's propagators carry it."""


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class _Message(_Struct, frozen=True, kw_only=True, tag_field="type"):
    pass


# -- requests -------------------------------------------------------------------------------------------------------------


class WireCall(_Struct, frozen=True, kw_only=True, gc=False):
    """A tool call in a conversation."""

    id: Name
    name: Name
    arguments: str


class WireChatMessage(_Struct, frozen=True, kw_only=True, gc=False):
    """One turn of a conversation."""

    role: Name
    content: str = ""
    name: Name | None = None
    tool_calls: Annotated[list[WireCall], Meta(max_length=128)] = []
    tool_call_id: Name | None = None


class WireSampling(_Struct, frozen=True, kw_only=True):
    """SamplingParams on the wire. ``response_format`` is (type, definition), a JSON schema being text; ``mirostat`` is
    (tau, eta)."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[int, float], Meta(max_length=1024)] | None = None
    stop: Annotated[list[str], Meta(max_length=64)] = []
    stop_token_ids: Annotated[list[int], Meta(max_length=1024)] = []
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: bytes | None = None
    bad_words: Annotated[list[str], Meta(max_length=64)] | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False
    response_format: tuple[Name, str | None] | None = None
    mirostat: tuple[float, float] | None = None


class WireRequest(_Struct, frozen=True, kw_only=True):
    """An InferenceRequest on the wire. The prompt is ``text``, ``token_ids`` (packed little-endian 32-bit integers) or
    ``messages``: one of them is there. ``tools`` and ``tool_choice`` are JSON text. ``logits_processors`` are
    functions of the caller's, and do not travel."""

    text: str | None = None
    token_ids: bytes | None = None
    messages: Annotated[list[WireChatMessage], Meta(max_length=4 * MAX_MESSAGES)] | None = None
    model_id: Name | None = None
    sampling: WireSampling = WireSampling()
    priority: int = 1
    client_id: Name = "default"
    session_id: Name | None = None
    deadline_s: float | None = None
    metadata: Annotated[dict[Name, Annotated[str, Meta(max_length=4096)]], Meta(max_length=64)] = {}
    tools: str = ""
    tool_choice: str = ""
    parse_special_tokens: bool = False


# -- from the client ------------------------------------------------------------------------------------------------------


class Hello(_Message, frozen=True, kw_only=True, tag="hello"):
    """The first message. ``client`` and ``trace`` may be there and are not used: each Submit brings its own trace."""

    version: int
    client: Name = ""
    trace: TraceContext = {}


class Submit(_Message, frozen=True, kw_only=True, tag="submit"):
    """A request, under an id of the client's, unique in its connection. ``credit`` chunks may be sent before a Credit."""

    request_id: RequestName
    request: WireRequest
    credit: NumChunks
    trace: TraceContext = {}


class Credit(_Message, frozen=True, kw_only=True, tag="credit"):
    """So many further chunks of a request may be sent."""

    request_id: Name
    chunks: NumChunks


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for this request any more."""

    request_id: Name


class Query(_Message, frozen=True, kw_only=True, tag="query"):
    """Asks for a Report, which carries the same ``query_id``. ``arrivals`` and ``diagnostics`` are for the daemon's own user
    alone."""

    query_id: int
    kind: Literal["status", "metrics", "health", "arrivals", "diagnostics"]


class Goodbye(_Message, frozen=True, kw_only=True, tag="goodbye"):
    """The client leaves; whatever it still has under way is cancelled."""


class EndSession(_Message, frozen=True, kw_only=True, tag="end_session"):
    """Gives up what a session keeps. The Report is ``true``, or ``false`` where there is no such session (any more)."""

    query_id: int
    session_id: Name
    client_id: Name = "default"


class ForkSession(_Message, frozen=True, kw_only=True, tag="fork_session"):
    """Asks for a further session that goes on from where this one stands. The Report is ``null``."""

    query_id: int
    session_id: Name
    new_session_id: Name
    client_id: Name = "default"


# -- from the daemon ------------------------------------------------------------------------------------------------------


class Limits(_Struct, frozen=True, kw_only=True):
    """What one connection may do: bytes in a frame, requests at once."""

    frame_bytes: int
    requests: int


class Welcome(_Message, frozen=True, kw_only=True, tag="welcome"):
    """The answer to Hello. ``config`` is the daemon's EngineConfig as JSON."""

    version: int
    model: str
    limits: Limits
    config: str


class Accepted(_Message, frozen=True, kw_only=True, tag="accepted"):
    """A request was admitted."""

    request_id: Name


class Chunks(_Message, frozen=True, kw_only=True, tag="chunks"):
    """What one step brought for the connection's requests, each under the id that the client gave it."""

    chunks: list[StreamChunk]


class Finished(_Message, frozen=True, kw_only=True, tag="finished"):
    """A request's last message: all its outputs have ended. The times are RequestMetrics', in seconds."""

    request_id: Name
    queue_s: float
    ttft_s: float
    total_s: float


class Failed(_Message, frozen=True, kw_only=True, tag="failed"):
    """A request's last message, or with no ``request_id`` the connection's: the code and message of a FerrumError."""

    code: Name
    message: str
    request_id: Name = ""
    retry_after: float | None = None


class Report(_Message, frozen=True, kw_only=True, tag="report"):
    """The answer to a Query: EngineStatus, EngineMetrics, HealthStatus, Arrivals or SchedulerDiagnostics as JSON; and to
    what is done to a session."""

    query_id: int
    content: str


class GoingAway(_Message, frozen=True, kw_only=True, tag="going_away"):
    """The daemon takes no more requests; those under way may finish within ``drain_s`` seconds."""

    reason: str
    drain_s: float


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """Comes in place of a Report: the code and message of a FerrumError. The connection goes on."""

    query_id: int
    code: Name
    message: str


ClientMessage = Hello | Submit | Credit | Cancel | Query | Goodbye | EndSession | ForkSession
ServerMessage = Welcome | Accepted | Chunks | Finished | Failed | Report | GoingAway | Refused
