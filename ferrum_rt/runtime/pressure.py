"""Telling the host how full the pages are."""

import logging
from collections.abc import Callable

from ferrum_rt.interfaces.types import MemoryPressure

_log = logging.getLogger(__name__)


class PressureWatch:
    """Calls the host's callbacks when the pressure reaches another level."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[MemoryPressure], None]] = []
        self._last = MemoryPressure.LOW

    def add(self, callback: Callable[[MemoryPressure], None]) -> None:
        """One more to call."""
        self._callbacks.append(callback)

    def look(self, pressure: MemoryPressure) -> None:
        """It is this now."""
        if pressure is self._last:
            return
        self._last = pressure
        for callback in self._callbacks:
            try:
                callback(pressure)
            except Exception:  # it is the host's, and so is what it raises
                _log.exception("a callback for memory pressure failed")
