"""Who may have a request under way, before anything is done for it."""

from collections import Counter
from collections.abc import Callable

from ferrum_rt.interfaces.config import SchedulerConfig
from ferrum_rt.interfaces.errors import ConfigError, ResourceExhausted
from ferrum_rt.interfaces.types import ClientId


class AdmissionPolicy:
    """At most ``capacity`` requests in all, and of each client what its policy says. ``retry_after`` is asked when one is
    refused: the seconds after which it may come again."""

    def __init__(self, config: SchedulerConfig, retry_after: Callable[[], float]) -> None:
        self._config, self._retry_after = config, retry_after
        self._counts: Counter[ClientId] = Counter()
        self._total = 0
        self._most_waiting = config.max_waiting_requests

    @property
    def capacity(self) -> int:
        return self._config.max_running_requests + self._config.max_waiting_requests

    def admit(self, client_id: ClientId, num_queued: int) -> None:
        """Count one more; ``num_queued`` wait for the tokenizer, those among them that were cancelled meanwhile. Raises
        ResourceExhausted."""
        count = self._counts[client_id]
        policy = self._config.policy(client_id)
        total = max(self._total, num_queued)
        if total >= self.capacity:
            self._refuse(f"{total} requests are under way or waiting, which is as many as the engine takes")
        if policy.max_requests is not None and count >= policy.max_requests:
            self._refuse(f"client {client_id!r} has {count} requests under way, which is as many as it may")
        self._counts[client_id] += 1
        self._total += 1

    def leave(self, client_id: ClientId) -> None:
        """One of them has ended."""
        self._total -= 1
        self._counts[client_id] -= 1
        if not self._counts[client_id]:
            del self._counts[client_id]

    def reconfigure(self, config: SchedulerConfig) -> None:
        """From now on; those under way stay. Raises ConfigError for what an engine cannot change any more."""
        before = self._config
        if config.max_running_requests != before.max_running_requests or config.max_waiting_requests > self._most_waiting:
            raise ConfigError(
                f"scheduler: of an open engine max_running_requests ({before.max_running_requests}) cannot be changed, and "
                f"max_waiting_requests cannot be raised above the {self._most_waiting} it was opened with"
            )
        self._config = config

    def _refuse(self, why: str) -> None:
        raise ResourceExhausted(why, retry_after=self._retry_after())
