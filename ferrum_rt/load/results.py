"""What a load test finds. A result is one JSON object; reports and pictures are made from it and from nothing else."""

from collections.abc import Mapping, Sequence

import msgspec

from ferrum_rt.interfaces.types import ClientId


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """When it came, in seconds from the begin of its repeat, and how many tokens it brought."""

    at_s: float
    tokens: int


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its sender saw it, in seconds from the begin of its repeat. ``due_s`` is when it should have been sent;
    everything that users wait for counts from there, however late it was ``sent_s``. ``error`` is a FerrumError's code, or
    a class's name; ``trace_id`` that of its spans, in hex."""

    index: int
    client: ClientId
    prompt_tokens: int
    due_s: float
    sent_s: float
    end_s: float
    chunks: Sequence[Chunk] = ()
    error: str | None = None
    trace_id: str | None = None

    @property
    def output_tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return self.chunks[0].at_s - self.due_s if self.chunks else None

    @property
    def e2e_s(self) -> float:
        """Time to the end."""
        return self.end_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first chunk, on average; None for a single chunk."""
        rest = self.output_tokens - self.chunks[0].tokens if self.chunks else 0
        return (self.chunks[-1].at_s - self.chunks[0].at_s) / rest if rest else None

    @property
    def itl_s(self) -> list[float]:
        """Times between tokens: of a chunk's tokens each its share of the time since the chunk before."""
        gaps = []
        for before, chunk in zip(self.chunks, self.chunks[1:], strict=False):
            gaps += [(chunk.at_s - before.at_s) / chunk.tokens] * chunk.tokens
        return gaps


class Sample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The engine at one moment, ``at_s`` seconds from the begin of its repeat."""

    at_s: float
    running: int
    waiting: int
    parked: int
    pages_free: int
    pages_active: int
    pages_cached: int


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A span that has ended; ids are in hex, times in nanoseconds since 1970; ``events`` are (name, time, attributes),
    ``links`` the ids of spans."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    attributes: Mapping[str, object] = {}
    events: Sequence[tuple[str, int, Mapping[str, object]]] = ()
    links: Sequence[str] = ()
    is_error: bool = False


class Repeat(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the workload. ``began_ns`` is its begin on the wall clock, as spans have it."""

    began_ns: int
    duration_s: float
    requests: Sequence[RequestRecord]
    samples: Sequence[Sample] = ()
    spans: Sequence[SpanRecord] = ()


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of one quantity, in seconds, over the requests (of ``itl_s``: over the tokens) of all repeats."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The mean of the repeats, and how far off it may be: half the width of its interval with 95 % confidence, by Student's
    t; None for a single repeat."""

    mean: float
    margin: float | None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to be good: seconds to its first token, and per token after it."""

    ttft_s: float | None = None
    itl_s: float | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A load test in numbers. Rates are per second; ``goodput`` is the rate of requests that keep the limits."""

    requests: int
    completed: int
    errors: Mapping[str, int]
    request_rate: Estimate
    output_token_rate: Estimate
    total_token_rate: Estimate
    goodput: Estimate
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    tpot_s: Percentiles | None
    e2e_s: Percentiles | None
    send_delay_s: Percentiles | None
    spans_dropped: int = 0


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """``load`` says what was sent, ``target`` to whom, in the words of the command line."""

    target: str
    load: Mapping[str, object]
    machine: Mapping[str, object]
    limits: Limits
    summary: Summary
    repeats: Sequence[Repeat]


class SweepPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A rate that was tried, and whether the share of good requests was high enough."""

    rate: float
    is_met: bool
    good_share: float
    summary: Summary


class SweepResult(msgspec.Struct, frozen=True, kw_only=True):
    """``highest_rate`` met the limits; None if no rate did. Points are in the order in which they were tried."""

    target: str
    load: Mapping[str, object]
    machine: Mapping[str, object]
    limits: Limits
    required_share: float
    highest_rate: float | None
    points: Sequence[SweepPoint]
