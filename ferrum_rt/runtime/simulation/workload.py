"""What requests come, and when: drawn from distributions, or read from a trace."""

import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Literal

import msgspec

from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.interfaces.types import DEFAULT_CLIENT, Arrival, ClientId, Priority

# A distribution's name → how many numbers it takes.
_SIZES = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}


class Sizes(msgspec.Struct, frozen=True):
    """A distribution of token counts, each at least 1: ``fixed`` (value), ``uniform`` (least, most), ``normal`` and
    ``lognormal`` (mean and standard deviation of the counts themselves)."""

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """``512``, ``uniform:16,1024``, ``normal:512,128`` or ``lognormal:512,400``. Raises ConfigError."""
        kind, _, rest = text.rpartition(":")
        try:
            numbers = tuple(float(number) for number in rest.split(","))
        except ValueError:
            numbers = ()
        sizes = cls(kind or "fixed", numbers)
        if len(numbers) != _SIZES.get(sizes.kind) or not all(0 <= number < math.inf for number in numbers) or numbers[0] < 1:
            raise ConfigError(
                f"{text!r} is no distribution of token counts; write 512, uniform:16,1024, normal:512,128 or "
                "lognormal:512,400 (mean and standard deviation)"
            )
        if sizes.kind == "uniform" and numbers[1] < numbers[0]:
            raise ConfigError(f"{text!r}: the first number of uniform is the least, the second the most")
        return sizes

    def draw(self, rng: Random) -> int:
        first, second = self.numbers[0], self.numbers[-1]
        match self.kind:
            case "fixed":
                value = first
            case "uniform":
                return rng.randint(math.ceil(first), math.floor(second))
            case "normal":
                value = rng.normalvariate(first, second)
            case _:
                variance = math.log1p((second / first) ** 2)
                value = rng.lognormvariate(math.log(first) - variance / 2, math.sqrt(variance))
        return max(1, round(value))


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """When requests come, ``rate`` of them a second: at equal distances, by a Poisson process, in bursts (gamma distances
    with the coefficient of variation ``burstiness``, where 1 is Poisson), or by a Poisson process whose rate swings by
    ``amplitude`` (0 to 1) of itself with a period of ``period_s``."""

    kind: Literal["constant", "poisson", "bursty", "seasonal"] = "poisson"
    rate: float = 1.0
    burstiness: float = 3.0
    period_s: float = 600.0
    amplitude: float = 0.8

    def __post_init__(self) -> None:
        for name, is_right, what in (
            ("rate", 0 < self.rate < math.inf, "more than 0"),
            ("burstiness", 0 < self.burstiness < math.inf, "more than 0"),
            ("period_s", 0 < self.period_s < math.inf, "more than 0"),
            ("amplitude", 0 <= self.amplitude <= 1, "from 0 to 1"),
        ):
            if not is_right:
                raise ConfigError(f"{name} must be {what}, got {getattr(self, name)}")

    def times(self, rng: Random) -> Iterator[float]:
        """In seconds, without an end."""
        if self.kind == "constant":
            yield from (number / self.rate for number in count())
        now = 0.0
        while True:
            match self.kind:
                case "bursty":
                    shape = self.burstiness**-2
                    now += rng.gammavariate(shape, 1 / (self.rate * shape))
                case "seasonal":
                    now = self._next_of_season(rng, now)
                case _:
                    now += rng.expovariate(self.rate)
            yield now

    def _next_of_season(self, rng: Random, now: float) -> float:
        """By thinning a process of the highest rate (Lewis and Shedler, 1979)."""
        highest = self.rate * (1 + self.amplitude)
        while True:
            now += rng.expovariate(highest)
            rate = self.rate * (1 + self.amplitude * math.sin(2 * math.pi * now / self.period_s))
            if rng.random() * highest < rate:
                return now


class ClientShare(msgspec.Struct, frozen=True, kw_only=True):
    """A client that sends ``share`` of the requests, against the other clients' shares."""

    client: ClientId = DEFAULT_CLIENT
    share: float = 1.0
    priority: Priority = Priority.NORMAL

    @classmethod
    def parse(cls, text: str) -> "ClientShare":
        """``NAME=SHARE`` or ``NAME=SHARE:PRIORITY``. Raises ConfigError."""
        name, _, rest = text.partition("=")
        share, _, priority = rest.partition(":")
        try:
            client = cls(client=ClientId(name), share=float(share), priority=Priority[(priority or "normal").upper()])
        except (ValueError, KeyError):
            client = cls(share=0.0)
        if not name or not 0 < client.share < math.inf:
            names = ", ".join(item.name.lower() for item in Priority)
            raise ConfigError(f"{text!r} is no client; write NAME=SHARE or NAME=SHARE:PRIORITY (one of {names})")
        return client


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests to be drawn."""

    arrivals: Arrivals = Arrivals()
    prompt: Sizes = Sizes("lognormal", (512, 512))
    output: Sizes = Sizes("lognormal", (128, 128))
    clients: Sequence[ClientShare] = (ClientShare(),)
    deadline_s: float | None = None

    def draw(self, num_requests: int, seed: int) -> list[Arrival]:
        """The same seed gives the same requests; more of them begin with the same."""
        times, rng = self.arrivals.times(Random(f"arrivals {seed}")), Random(f"requests {seed}")
        shares = [item.share for item in self.clients]
        drawn = []
        for moment in islice(times, num_requests):
            client = rng.choices(self.clients, shares)[0]
            arrival = Arrival(
                arrival_s=moment,
                prompt_tokens=self.prompt.draw(rng),
                output_tokens=self.output.draw(rng),
                client=client.client,
                priority=client.priority,
                deadline_s=self.deadline_s,
            )
            drawn.append(arrival)
        return drawn


class _Line(Arrival, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As a trace has it: the priority by name or by number."""

    priority: Priority | Literal["low", "normal", "high", "critical"] = Priority.NORMAL  # type: ignore[assignment]


def read_trace(path: Path) -> list[Arrival]:
    """One JSON object a line, with Arrival's fields, in any order of time. Raises ConfigError naming the line."""
    decoder, arrivals = msgspec.json.Decoder(_Line), []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: line {number}: {error}") from error
        fields = {name: getattr(line, name) for name in Arrival.__struct_fields__}
        if isinstance(line.priority, str):
            fields["priority"] = Priority[line.priority.upper()]
        for name in ("arrival_s", "prompt_tokens", "output_tokens"):
            least = 0 if name == "arrival_s" else 1
            if not least <= fields[name] < math.inf:
                raise ConfigError(f"{path}: line {number}: {name} must be at least {least}, got {fields[name]}")
        arrivals.append(Arrival(**fields))
    if not arrivals:
        raise ConfigError(
            f"{path}: has no requests; write one JSON object a line with arrival_s, prompt_tokens, output_tokens"
        )
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)
