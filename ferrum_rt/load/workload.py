"""What a load test sends: prompts of token ids, drawn from distributions or as large as a trace has them."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

import msgspec

from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.types import DEFAULT_CLIENT, Arrival, ClientId, Priority, TokenId
from ferrum_rt.runtime.simulation.workload import Arrivals, Sizes, Workload, read_trace


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """To be sent ``due_s`` seconds after the begin, or in the closed loop (None) when it is its turn."""

    index: int
    token_ids: Sequence[TokenId]
    output_tokens: int
    due_s: float | None = None
    client: ClientId = DEFAULT_CLIENT
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None


class SharedPrefixes(msgspec.Struct, frozen=True):
    """Prompts begin with one of ``count`` texts, each of ``tokens`` tokens."""

    count: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> "SharedPrefixes":
        """``10x256``. Raises ConfigError."""
        count, _, tokens = text.partition("x")
        if not (count.isdecimal() and tokens.isdecimal() and int(count) and int(tokens)):
            raise ConfigError(f"{text!r} is no number of shared prefixes and their tokens; write 10x256")
        return cls(int(count), int(tokens))


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A load to be drawn: at ``rate`` requests a second with gamma-distributed distances (``burstiness`` is their
    coefficient of variation: 1 is Poisson, 0 is a metronome), or, where that is None, ``concurrency`` at a time. ``trace``
    takes the place of all but the concurrency."""

    requests: int
    prompt: Sizes
    output: Sizes
    prefixes: SharedPrefixes | None = None
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int = 1
    trace: Path | None = None

    def draw(self, seed: int, *, vocabulary: Sequence[TokenId], max_model_len: int) -> list[LoadRequest]:
        """The same seed gives the same requests, cut to what the model can take. Raises ConfigError."""
        arrivals = self._arrivals(seed)
        rng = Random(f"tokens {seed}")
        prefixes = self._prefixes(vocabulary)
        requests = []
        for index, arrival in enumerate(arrivals):
            output_tokens = min(arrival.output_tokens, max_model_len - 1)
            begin = rng.choice(prefixes)
            rest = rng.choices(vocabulary, k=arrival.prompt_tokens)
            requests.append(
                LoadRequest(
                    index=index,
                    token_ids=[*begin, *rest][: max_model_len - output_tokens],
                    output_tokens=output_tokens,
                    due_s=arrival.arrival_s if self.is_open else None,
                    client=arrival.client,
                    priority=arrival.priority,
                    deadline_s=arrival.deadline_s,
                )
            )
        return requests

    @property
    def is_open(self) -> bool:
        """Requests come when they come, whatever became of those before."""
        return self.rate is not None or self.trace is not None

    def _arrivals(self, seed: int) -> list[Arrival]:
        if self.trace is not None:
            return read_trace(self.trace)
        rate = self.rate or 1.0  # of the closed loop nobody looks at the times
        kind: Literal["bursty", "constant"] = "bursty" if self.burstiness else "constant"
        arrivals = Arrivals(kind=kind, rate=rate, burstiness=self.burstiness or 1.0)
        return Workload(arrivals=arrivals, prompt=self.prompt, output=self.output).draw(self.requests, seed)

    def _prefixes(self, vocabulary: Sequence[TokenId]) -> list[list[TokenId]]:
        """The same in every repeat: that they are known already is what they are for."""
        if self.prefixes is None:
            return [[]]
        rng = Random("prefixes")
        return [rng.choices(vocabulary, k=self.prefixes.tokens) for _ in range(self.prefixes.count)]
