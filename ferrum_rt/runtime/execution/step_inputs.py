"""What a step on a device needs from the host, laid out so that one copy brings it there."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ferrum_rt.interfaces.sampler import GREEDY_BELOW, SamplingConfig
from ferrum_rt.kernels.cuda.device import StreamDevice
from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams
from ferrum_rt.kernels.sampling import streams, uniform_on_host

_ROW_WORDS = 5  # three fields of 64 bits and four of 32
_MOST_TOP_K = 2**31 - 1


class RowInputs(NamedTuple):
    """The rows that are sampled from, on the device: their ``slots`` [R], and where the tokens before the drawn ones stand,
    ``positions`` [R]."""

    slots: Tensor
    positions: Tensor
    draw: DrawParams


class StepInputs:
    """Words of 64 bits: first a part for each field of ``num_rows`` sampled rows, which stays where it is, for CUDA graphs
    read it; behind it whatever else a step has, one list after the other. Twice on the host, in turns: one can be written
    while the copy from the other has not yet run.

    How a slot's rows are drawn is kept on the host, and goes along with each step: a gather on the device for each of five
    fields would take longer than the copy of a few kilobytes. ``form`` is the draw that is enough for the step's rows.
    """

    form: DrawForm

    def __init__(self, device: StreamDevice, num_rows: int, num_words: int) -> None:
        self._device, self._num_rows = device, num_rows
        capacity = _ROW_WORDS * num_rows + num_words
        self._words = torch.zeros(capacity, dtype=torch.int64, device=device.name)
        self._pinned = [device.pinned(capacity, torch.int64) for _ in range(2)]
        self._staged = [pinned.numpy() for pinned in self._pinned]
        self._turn = self._end = 0
        # The last slot is for rows that only fill up a batch.
        self._streams = np.zeros(num_rows + 1, dtype=np.int64)
        self._forms = np.zeros(num_rows + 1, dtype=np.int8)
        self._settings = np.zeros((4, num_rows + 1), dtype=np.int32)
        self._settings.view(np.float32)[1] = 1.0

    def assign(self, slot: int, config: SamplingConfig) -> None:
        """How the slot's rows are drawn from now on: greedily, if its configuration is not plain, for then that is not what
        counts."""
        if not config.is_plain:
            config = SamplingConfig()
        self._streams[[slot]] = streams(np.array([config.seed]), np.array([config.sample_index]))
        self._forms[slot] = _form(config)
        self._settings.view(np.float32)[:3, slot] = config.temperature, config.top_p, config.min_p
        self._settings[3, slot] = min(config.top_k, _MOST_TOP_K)

    def begin(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """A new step, whose sampled rows belong to ``slots``; the tokens drawn will stand at ``positions``."""
        self._turn ^= 1
        self._end = _ROW_WORDS * self._num_rows
        staged, count = self._staged[self._turn], len(slots)
        rows, before, draws = staged[: 3 * self._num_rows].reshape(3, -1)[:, :count]
        rows[:], before[:] = slots, positions
        draws.view(np.float64)[:] = uniform_on_host(self._streams[rows], before)
        before -= 1
        narrow = staged[3 * self._num_rows : self._end].view(np.int32).reshape(4, -1)
        narrow[:, :count] = self._settings[:, rows]
        self.form = DrawForm(self._forms[rows].max(initial=DrawForm.GREEDY))

    def put(self, values: Sequence[int]) -> Tensor:
        """Where the values [len] will stand on the device once ``upload`` has run, until the next step's has."""
        start, self._end = self._end, self._end + len(values)
        self._staged[self._turn][start : self._end] = values
        return self._words[start : self._end]

    def upload(self) -> None:
        """Enqueue the copy."""
        self._device.copy(self._words[: self._end], self._pinned[self._turn][: self._end])

    def rows(self, count: int) -> RowInputs:
        """The first ``count`` sampled rows of the step."""
        slots, positions, draws = self._words[: 3 * self._num_rows].view(3, -1)[:, :count].unbind()
        narrow = self._words[3 * self._num_rows : _ROW_WORDS * self._num_rows].view(torch.int32).view(4, -1)
        temperature, top_p, min_p = narrow[:3].view(torch.float32)[:, :count].unbind()
        draw = DrawParams(temperature, narrow[3, :count], top_p, min_p, draws.view(torch.float64))
        return RowInputs(slots, positions, draw)


def _form(config: SamplingConfig) -> DrawForm:
    if config.temperature <= GREEDY_BELOW:
        return DrawForm.GREEDY
    return DrawForm.TRUNCATED if config.top_k > 0 or config.top_p < 1 else DrawForm.WHOLE
