"""How late the host's event loop comes to what is ready for it.

There is no task for it, so an idle engine wakes nobody: each call that one of our threads has finished is timed from there
to where the event loop takes it up. Whatever keeps the loop from it in between, the engine's requests wait as long.
"""

import logging
import math
import time

REPORTED_S = 0.1
REPORT_EVERY_S = 60.0

_log = logging.getLogger("ferrum_rt")


class LoopLag:
    """``max_s`` and ``total_s`` are in seconds, since the start; what two calls wait for at the same time counts once."""

    def __init__(self) -> None:
        self.max_s = 0.0
        self.total_s = 0.0
        self._seen_at = self._reported_at = -math.inf

    def observe(self, ready_at: float) -> None:
        """In the event loop's thread: it takes up what was ready at this time of time.monotonic's. ``REPORTED_S`` and more
        are logged, once in ``REPORT_EVERY_S``."""
        now = time.monotonic()
        late = now - ready_at
        self.max_s = max(self.max_s, late)
        self.total_s += now - max(ready_at, self._seen_at)
        self._seen_at = now
        if late >= REPORTED_S and now - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            _log.warning(
                "the event loop was blocked for %.2f s while requests were under way; call what blocks it in a thread", late
            )
