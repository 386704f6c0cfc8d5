"""Who is next: the highest class; in it the client that was served least; of its requests the one that is due first.

Service is counted in tokens, by the virtual token counters of "Fairness in Serving Large Language Models" (Sheng et al.,
OSDI '24): of two clients that both have requests waiting in a class, neither is ever served more, by weight, than the
other by more than a prompt and what its running requests then put out. Who comes back is lifted to where the others are:
nobody saves up service by staying away.

A request that has waited for ``ageing_steps`` steps goes up a class, so that none waits for ever behind those above it.
Within a client, what has no deadline is due ``_DUE_AFTER_S`` after it came, so that deadlines do not starve it either.
Every operation takes time logarithmic in those who wait, but for moving pointers in a list.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from operator import itemgetter

from ferrum_rt.interfaces.types import ClientId, Priority
from ferrum_rt.runtime.scheduling.clients import Clients
from ferrum_rt.runtime.scheduling.sequence import Sequence

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""What a token counts for; an output's takes a step of its own (the paper's weights)."""
_DUE_AFTER_S = 60.0
_MAX_COUNTERS = 4096

_Key = tuple[bool, float, int]
_first = itemgetter(0)


def _key(sequence: Sequence) -> _Key:
    """Sorts a client's sequences, the last one first to go: those that have run, or whose prompt has been computed, before
    all others."""
    request = sequence.request
    due = request.submitted_at + _DUE_AFTER_S if request.deadline is None else request.deadline
    return (sequence.num_starts > 0 or sequence.index > 0, -due, -sequence.arrival)


class _Class:
    """The waiting sequences of one priority. ``order`` has (counter, client) for each client with any, least first;
    ``since`` the step from which each sequence waits here, oldest first. ``floor`` is the counter of the client that was
    next last: who has nothing waiting is lifted there when he has again."""

    def __init__(self) -> None:
        self.order: list[tuple[float, ClientId]] = []
        self.queues: dict[ClientId, list[tuple[_Key, Sequence]]] = {}
        self.since: OrderedDict[Sequence, int] = OrderedDict()
        self.counters: dict[ClientId, float] = {}
        self.floor = 0.0

    def push(self, sequence: Sequence, step: int) -> None:
        client_id = sequence.request.client_id
        if client_id not in self.queues:
            self.queues[client_id] = []
            counter = self.counters[client_id] = max(self.floor, self.counters.get(client_id, 0.0))
            insort(self.order, (counter, client_id))
        insort(self.queues[client_id], (_key(sequence), sequence), key=_first)
        self.since[sequence] = step

    def remove(self, sequence: Sequence) -> None:
        client_id = sequence.request.client_id
        queue = self.queues[client_id]
        del queue[bisect_left(queue, _key(sequence), key=_first)]
        del self.since[sequence]
        if not queue:
            del self.queues[client_id]
            del self.order[bisect_left(self.order, (self.counters[client_id], client_id))]
            if len(self.counters) > _MAX_COUNTERS + 2 * len(self.queues):
                self._forget()

    def serve(self, client_id: ClientId, amount: float) -> None:
        before = self.counters.get(client_id, self.floor)
        after = self.counters[client_id] = before + amount
        if client_id in self.queues:
            del self.order[bisect_left(self.order, (before, client_id))]
            insort(self.order, (after, client_id))

    def _forget(self) -> None:
        """The counters of clients that have nothing waiting here: those at the floor say nothing; of the others the highest
        stay."""
        away = [(counter, client_id) for client_id, counter in self.counters.items() if client_id not in self.queues]
        for _, client_id in sorted(away)[: -_MAX_COUNTERS // 2]:
            del self.counters[client_id]


class WaitingQueue:
    """All of them; ``clients`` knows the weights."""

    def __init__(self, clients: Clients, ageing_steps: int) -> None:
        self.ageing_steps = ageing_steps
        self._clients = clients
        self._step = 0
        self._classes = {priority: _Class() for priority in sorted(Priority, reverse=True)}

    def __len__(self) -> int:
        return sum(len(own.since) for own in self._classes.values())

    def __iter__(self) -> Iterator[Sequence]:
        for own in self._classes.values():
            yield from own.since

    def push(self, sequence: Sequence) -> None:
        """It waits from now on."""
        self._classes[sequence.priority].push(sequence, self._step)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, though it got no slot."""
        self._classes[sequence.priority].remove(sequence)

    def admit(self, sequence: Sequence) -> None:
        """It was next and gets its slot; its prompt counts as served, the first time."""
        own, request = self._classes[sequence.priority], sequence.request
        own.floor = max(own.floor, own.counters[request.client_id])
        if not sequence.num_starts and sequence.index == 0:
            self.serve(sequence.priority, request.client_id, num_inputs=len(request.token_ids))
        own.remove(sequence)

    def first(self, without: Container[ClientId] = ()) -> Sequence | None:
        """Who is next, of the clients that are not left out."""
        for own in self._classes.values():
            for _, client_id in own.order:
                if client_id not in without:
                    return own.queues[client_id][-1][1]
        return None

    def standing(self, sequence: Sequence) -> tuple[int, float, int]:
        """Sorts sequences, waiting or running, the one first that is to have the next tokens of a prompt computed."""
        own = self._classes[sequence.priority]
        counter = own.counters.get(sequence.request.client_id, own.floor)
        return (-sequence.priority, counter, sequence.arrival)

    def serve(self, priority: Priority, client_id: ClientId, *, num_inputs: int = 0, num_outputs: int = 0) -> None:
        """Count tokens that a client was served in a class."""
        weight = self._clients.policy(client_id).weight
        self._classes[priority].serve(client_id, (INPUT_WEIGHT * num_inputs + OUTPUT_WEIGHT * num_outputs) / weight)

    def counts(self) -> dict[Priority, int]:
        """How many wait in each class."""
        return {priority: len(own.since) for priority, own in self._classes.items()}

    def counters(self) -> dict[Priority, dict[ClientId, float]]:
        """Weighted tokens of service, of the clients that were served lately."""
        return {priority: dict(own.counters) for priority, own in self._classes.items() if own.counters}

    def backlogs(self) -> list[list[float]]:
        """The counters of the clients that wait in each class."""
        return [[counter for counter, _ in own.order] for own in self._classes.values() if own.order]

    def restore(self, served: Mapping[Priority, Mapping[ClientId, float]]) -> None:
        """Take over counters."""
        for priority, counters in served.items():
            for client_id, amount in counters.items():
                self._classes[priority].serve(client_id, amount)

    def forget(self) -> None:
        """Nobody has anything under way: nobody is owed anything."""
        for own in self._classes.values():
            own.counters.clear()
            own.floor = 0.0

    def age(self) -> None:
        """Another step is planned: whoever has waited long enough goes up."""
        self._step += 1
        for priority, own in self._classes.items():
            while priority < Priority.CRITICAL and own.since:
                sequence, since = next(iter(own.since.items()))
                if self._step - since < self.ageing_steps:
                    break
                own.remove(sequence)
                sequence.priority = Priority(priority + 1)
                self._classes[sequence.priority].push(sequence, self._step)
