"""CUDA graphs for steps with prompts in them: all of a forward but attention, whose launches depend on the sequences."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ferrum_rt.interfaces.tensor import TensorOps
from ferrum_rt.kernels.batch import TokenBatch
from ferrum_rt.kernels.cuda.attention import AttentionGaps
from ferrum_rt.kernels.cuda.device import StreamDevice

_MOST_ROWS = 512
"""More rows keep a GPU busy for longer than their launches take the host."""
_PADDED_UP_TO = 256
"""So many rows take hardly longer than one: the weights must be read in any case."""


def piece_sizes(max_tokens: int) -> list[int]:
    """Numbers of rows to capture, ascending, none above ``max_tokens``: powers of two from 16 on as long as padding costs
    next to nothing, then every 64."""
    most = min(max_tokens, _MOST_ROWS)
    return [*(size for size in (16, 32, 64, 128, *range(_PADDED_UP_TO, most, 64)) if size < most), most]


class StepPieces:
    """The forward of ``batch``'s rows, whatever is in them, in graphs between which the layers attend."""

    def __init__(
        self,
        device: StreamDevice,
        ops: TensorOps[Tensor],
        forward: Callable[[Any], tuple[TokenBatch, Tensor]],
    ) -> None:
        """Capture ``forward``, which is given what stands for the plan of attention, and has run before."""
        gaps = AttentionGaps(device.cut)
        made: list[tuple[TokenBatch, Tensor]] = []
        self._graphs = device.capture(lambda: made.append(forward(gaps)))
        self._ops, self._calls = ops, gaps.calls
        ((self.batch, self._hidden),) = made

    def replay(self, plan: Any, num_rows: int) -> Tensor:
        """What the layers make of the first ``num_rows`` rows [num_rows, hidden]; the others belong to nobody."""
        for graph, call in zip(self._graphs, self._calls, strict=False):  # a graph more than there are gaps
            graph.replay()
            self._ops.attention(call.out[:num_rows], call.q[:num_rows], call.layer, plan, call.kind)
        self._graphs[-1].replay()
        return self._hidden[:num_rows]
