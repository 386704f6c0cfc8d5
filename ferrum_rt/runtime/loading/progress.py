"""A bar on the terminal while a model gets ready."""

import sys
from collections.abc import Callable

_WIDTH = 30


def progress_bar(what: str, unit: str, *, enabled: bool) -> Callable[[int, int], None]:
    """A function to be told (done, total). Draws only where somebody can see it: on a terminal."""
    if not enabled or not sys.stderr.isatty():
        return lambda done, total: None

    def draw(done: int, total: int) -> None:
        filled = _WIDTH * done // total
        end = "\r\033[K" if done == total else ""  # a bar that is full has nothing more to say
        bar = f"\r{what} [{'=' * filled}{' ' * (_WIDTH - filled)}] {done}/{total} {unit}"
        print(bar, end=end, file=sys.stderr, flush=True)

    return draw
