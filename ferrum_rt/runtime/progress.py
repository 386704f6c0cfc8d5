"""A bar on the terminal while a model loads."""

import sys
from collections.abc import Callable

_WIDTH = 30


def loading_bar(name: str, *, enabled: bool) -> Callable[[int, int], None]:
    """A function to be told (done, total). Draws only where somebody can see it: on a terminal."""
    if not enabled or not sys.stderr.isatty():
        return lambda done, total: None

    def draw(done: int, total: int) -> None:
        filled = _WIDTH * done // total
        end = "\r\033[K" if done == total else ""  # a bar that is full has nothing more to say
        bar = f"\rloading {name} [{'=' * filled}{' ' * (_WIDTH - filled)}] {done}/{total} layers"
        print(bar, end=end, file=sys.stderr, flush=True)

    return draw
