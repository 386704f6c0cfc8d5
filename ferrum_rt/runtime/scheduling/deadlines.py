"""When requests are to be looked at again because of their deadlines."""

import heapq
from collections.abc import Callable, Iterator

from ferrum_rt.interfaces.scheduler import SequenceRequest


class Deadlines:
    """First when the last moment comes to begin a request, then its deadline itself. Requests that have ended stay until
    their time, or until as many of them as of the others are here."""

    def __init__(self, is_live: Callable[[SequenceRequest], bool]) -> None:
        self._is_live = is_live
        self._due: list[tuple[float, int, SequenceRequest]] = []
        self._num_added = 0
        self._purge_at = 64

    def add(self, due: float, request: SequenceRequest) -> None:
        """Look at this one at ``due``."""
        self._num_added += 1
        heapq.heappush(self._due, (due, self._num_added, request))
        if len(self._due) > self._purge_at:
            self._due = [entry for entry in self._due if self._is_live(entry[2])]
            heapq.heapify(self._due)
            self._purge_at = 64 + 2 * len(self._due)

    def passed(self, now: float) -> Iterator[tuple[float, SequenceRequest]]:
        """Those that are due, and since when."""
        while self._due and self._due[0][0] <= now:
            due, _, request = heapq.heappop(self._due)
            if self._is_live(request):
                yield due, request

    def next(self) -> float | None:
        """The moment at which one of them is due."""
        while self._due and not self._is_live(self._due[0][2]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None
