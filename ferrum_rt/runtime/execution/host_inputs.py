"""What a step on the CPU reads, in memory that stays where it is: a recorded program knows it by its addresses.

Written through numpy, which keeps the GIL for arrays this small; torch would offer it to the host at each of these lines.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.kernels.batch import QuerySpan, TokenBatch
from ferrum_rt.runtime.execution.step_rows import StepRows, table_changes


class HostInputs:
    """The block tables and the tokens sampled last, of ``num_slots`` slots; and a step's rows, at most ``max_tokens``."""

    def __init__(self, num_slots: int, max_tokens: int, pages_per_slot: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_slots, pages_per_slot), dtype=np.int64)
        self._last_tokens = np.zeros(num_slots, dtype=np.int64)
        self._tokens, self._positions, self._kv_slots = np.zeros((3, max_tokens), dtype=np.int64)
        self._logit_rows = np.zeros(num_slots, dtype=np.int64)
        self.spans: list[QuerySpan] = []
        self.sampled_slots: list[int] = []
        self.num_tokens = self.num_sampled = 0

    def take_over(self, step: StepInput) -> None:
        """What changed in the slots."""
        at, pages = table_changes(step, self._tables.shape[1])
        if at:
            self._tables.reshape(-1)[at] = pages

    def fill(self, rows: StepRows) -> None:
        """The rows of the next step."""
        num_decodes, slots = rows.num_decodes, np.array(rows.slots, dtype=np.int64)
        self.sampled_slots = rows.sampled_slots
        self.spans, self.num_tokens, self.num_sampled = rows.spans, len(slots), len(rows.logit_rows)
        self._positions[: self.num_tokens] = rows.positions
        self._tokens[:num_decodes] = self._last_tokens[slots[:num_decodes]]
        self._tokens[num_decodes : self.num_tokens] = rows.known
        self._place(slots)
        self._logit_rows[: self.num_sampled] = rows.logit_rows

    def advance(self, tokens: Sequence[TokenId | None]) -> None:
        """After a round of decodes that has sampled these tokens: the next one's rows."""
        self.spans = [span._replace(start=span.start + 1) for span in self.spans]
        self._positions[: self.num_tokens] += 1
        self._tokens[: self.num_tokens] = [token or 0 for token in tokens]
        self._place(np.array([span.slot for span in self.spans], dtype=np.int64))

    def keep(self, slots: Sequence[int], tokens: Sequence[TokenId | None]) -> None:
        """The tokens that the slots sampled last."""
        self._last_tokens[list(slots)] = [token or 0 for token in tokens]

    def batch(self) -> TokenBatch:
        """The step's rows, where they lie."""
        return self._batch(self.num_tokens, self.num_sampled, self.spans)

    def largest_batch(self) -> TokenBatch:
        """All of the memory; a span for each slot."""
        spans = [QuerySpan(slot, 0, 1, 0) for slot in range(len(self._logit_rows))]
        return self._batch(len(self._tokens), len(self._logit_rows), spans)

    def _place(self, slots: NDArray[np.int64]) -> None:
        """Where in the pages the rows' keys and values go, by their slots and positions."""
        positions, size = self._positions[: len(slots)], self._block_size
        self._kv_slots[: len(slots)] = self._tables[slots, positions // size] * size + positions % size

    def _batch(self, num_tokens: int, num_sampled: int, spans: list[QuerySpan]) -> TokenBatch:
        return TokenBatch(
            token_ids=_tensor(self._tokens[:num_tokens]),
            positions=_tensor(self._positions[:num_tokens]),
            kv_slots=_tensor(self._kv_slots[:num_tokens]),
            logit_rows=_tensor(self._logit_rows[:num_sampled]),
            spans=spans,
            block_tables=_tensor(self._tables),
            block_size=self._block_size,
        )


def _tensor(values: NDArray[np.int64]) -> Tensor:
    """The same memory."""
    return torch.from_numpy(values)
