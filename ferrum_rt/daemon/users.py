"""What each user, a uid, has of the daemon at the moment. Requests are counted from submission until nothing of the engine
holds them any more: one that was cancelled while its prompt was being read still takes room."""

from typing import NamedTuple

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.interfaces.errors import ResourceExhausted
from ferrum_rt.interfaces.types import ClientId
from ferrum_rt.runtime.generation import Generation


class Cost(NamedTuple):
    """Of a request: the tokens that it may come to, and the bytes that it was sent in."""

    tokens: int
    num_bytes: int


class User:
    """``num_bytes`` are those that wait in its connections, to be understood or to be read, and those of its requests."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.num_connections = 0
        self.num_requests = 0
        self.num_tokens = 0
        self.num_bytes = 0
        self._ended: list[tuple[Generation, Cost]] = []

    def client_id(self, name: str) -> ClientId:
        """Whatever a client calls itself, its sessions and the prefixes that it shares are its user's alone."""
        return ClientId(f"uid {self.uid}/{name}")

    def take(self, cost: Cost, limits: DaemonLimits) -> None:
        """Count a request in. Raises ResourceExhausted, naming the limit that it would break."""
        if self._excess(cost, limits):
            self.settle()
            if reason := self._excess(cost, limits):
                raise ResourceExhausted(reason)
        self.num_requests += 1
        self.num_tokens += cost.tokens
        self.num_bytes += cost.num_bytes

    def _excess(self, cost: Cost, limits: DaemonLimits) -> str:
        for name, has, more, limit in (
            ("requests", self.num_requests, 1, limits.user_requests),
            ("tokens", self.num_tokens, cost.tokens, limits.user_tokens),
            ("bytes", self.num_bytes, cost.num_bytes, limits.user_bytes),
        ):
            if has + more > limit:
                return f"this user has {has} {name} under way, and with {more} more it would pass its limit of {limit}"
        return ""

    def give_back(self, cost: Cost, generation: Generation | None) -> None:
        """Count a request out: now, or when its ``generation`` is in no queue any more."""
        if generation is not None and generation.is_queued:
            self._ended.append((generation, cost))
        else:
            self.num_requests -= 1
            self.num_tokens -= cost.tokens
            self.num_bytes -= cost.num_bytes

    def settle(self) -> None:
        """Count out the ended requests that have left the engine's queues meanwhile."""
        ended, self._ended = self._ended, []
        for generation, cost in ended:
            self.give_back(cost, generation)
