"""The spans that a daemon under test has written, brought to the requests that they tell of."""

import time
from collections.abc import Sequence
from pathlib import Path

import anyio

from ferrum_rt.load.results import Repeat
from ferrum_rt.load.spans import num_untraced, read_spans, with_spans

# Exporters write every few seconds.
LIMIT_S = 15.0
LOOK_EVERY_S = 0.2


async def with_spans_of_daemon(path: Path, repeats: Sequence[Repeat]) -> list[Repeat]:
    """As soon as the file has those of every completed request, or else after ``LIMIT_S`` with what it has by then. Raises
    ConfigError for a file that has something else in it."""
    give_up_at = time.monotonic() + LIMIT_S
    while True:
        found = _joined(path, repeats)
        if not any(num_untraced(repeat.requests, repeat.spans) for repeat in found) or time.monotonic() > give_up_at:
            return found
        await anyio.sleep(LOOK_EVERY_S)


def _joined(path: Path, repeats: Sequence[Repeat]) -> list[Repeat]:
    spans = read_spans(path)
    return [with_spans(repeat, spans) for repeat in repeats]
