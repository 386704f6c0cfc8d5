"""What each client has under way, for its limits and its share of the slots."""

from collections.abc import Iterable
from dataclasses import dataclass

from ferrum_rt.interfaces.config import ClientPolicy, SchedulerConfig
from ferrum_rt.interfaces.types import ClientId


@dataclass(slots=True)
class ClientState:
    """Sequences that are alive, those of them that run, the pages these hold, the tokens of prompts that wait, and those
    that were generated for it so far."""

    policy: ClientPolicy
    num_live: int = 0
    num_running: int = 0
    num_pages: int = 0
    num_queued_tokens: int = 0
    num_generated: int = 0


class Clients:
    """Those with something under way, by id."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._states: dict[ClientId, ClientState] = {}
        self._total_weight = 0.0

    def __getitem__(self, client_id: ClientId) -> ClientState:
        return self._states[client_id]

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._states

    def items(self) -> Iterable[tuple[ClientId, ClientState]]:
        return self._states.items()

    def policy(self, client_id: ClientId) -> ClientPolicy:
        """What holds for a client, whether it is here or not."""
        return self._config.policy(client_id)

    def why_not_queue(self, client_id: ClientId, num_tokens: int) -> str | None:
        """Why a prompt of so many tokens may not wait beside the client's others; None if it may."""
        state, limit = self._states.get(client_id), self.policy(client_id).max_queued_tokens
        total = num_tokens + (0 if state is None else state.num_queued_tokens)
        if limit is None or total <= limit:
            return None
        return f"with this prompt {total} tokens of client {client_id!r} would wait, and {limit} may"

    def arrive(self, client_id: ClientId, num_sequences: int) -> None:
        """So many more of its sequences are alive."""
        state = self._states.get(client_id)
        if state is None:
            state = self._states[client_id] = ClientState(self.policy(client_id))
            self._total_weight += state.policy.weight
        state.num_live += num_sequences

    def leave(self, client_id: ClientId) -> None:
        """One of them has ended."""
        state = self._states[client_id]
        state.num_live -= 1
        if not state.num_live:
            del self._states[client_id]
            self._total_weight = self._total_weight - state.policy.weight if self._states else 0.0

    def share(self, client_id: ClientId, total: int) -> float:
        """What of ``total`` is this client's, by weight, among those who are here."""
        return total * self._states[client_id].policy.weight / self._total_weight

    def reconfigure(self, config: SchedulerConfig) -> None:
        """From now on."""
        self._config = config
        for client_id, state in self._states.items():
            state.policy = self.policy(client_id)
        self._total_weight = sum(state.policy.weight for state in self._states.values())
