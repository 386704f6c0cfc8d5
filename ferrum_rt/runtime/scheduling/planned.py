"""What was planned and has not landed yet."""

from dataclasses import dataclass
from typing import NamedTuple

from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.types import BatchId
from ferrum_rt.runtime.scheduling.cost_model import StepWork
from ferrum_rt.runtime.scheduling.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Entry:
    """One sequence's part in a planned step: when it is committed, the tokens from ``start`` to ``end`` are computed in
    ``handle``'s pages. ``num_retries`` is the sequence's, at the time."""

    sequence: Sequence
    handle: KvCacheHandle
    start: int
    end: int
    samples: bool
    num_retries: int

    @property
    def is_lost(self) -> bool:
        """The sequence has ended, or was taken back to be computed again since this was planned."""
        sequence = self.sequence
        return sequence.state is SequenceState.FINISHED or sequence.num_retries != self.num_retries


class PlannedStep(NamedTuple):
    """Its entries stand in the order of the batch. ``work`` is that of each of its rounds."""

    batch_id: BatchId
    entries: list[Entry]
    work: StepWork
    num_swaps: int
    num_rounds: int
