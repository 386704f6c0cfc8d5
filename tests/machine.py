"""How fast this machine is just now, for bounds on processor time."""

import time

# Of the loop below, on the machine that such bounds were set on.
_LOOP_S = 0.01


def seconds_here(seconds: float) -> float:
    """What may be as much work here as ``seconds`` were there; never less."""
    began = time.thread_time()
    sum(i * i for i in range(200_000))
    return seconds * max(1.0, (time.thread_time() - began) / _LOOP_S)
