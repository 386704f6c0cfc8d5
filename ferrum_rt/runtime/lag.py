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
    """``max_s`` and ``total_s`` are in seconds, since the start."""

    def __init__(self) -> None:
        self.max_s = 0.0
        self.total_s = 0.0
        self._reported_at = -math.inf

    def observe(self, seconds: float) -> None:
        """In the event loop's thread. ``REPORTED_S`` and more are logged, once in ``REPORT_EVERY_S``."""
        self.max_s = max(self.max_s, seconds)
        self.total_s += seconds
        if seconds >= REPORTED_S and (now := time.monotonic()) - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = now
            _log.warning(
                "the event loop was blocked for %.2f s while requests were under way; call what blocks it in a thread "
                "(the worst so far: %.2f s)",
                seconds,
                self.max_s,
            )
