"""From logits to tokens."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from ferrum_rt.interfaces.types import TokenId

T_contra = TypeVar("T_contra", contravariant=True)


class SamplingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """SamplingParams after the model's defaults are filled in: what the sampler needs for one sequence, all neutral when
    left alone except ``temperature``, where 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


class SamplingContext(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one step: row i of the logits belongs to slot ``slots[i]``; the token drawn from it will stand at
    ``positions[i]`` of its sequence."""

    slots: Sequence[int]
    positions: Sequence[int]


class LogitsProcessor(Protocol[T_contra]):
    """Changes logits [rows, vocabulary] in place before sampling."""

    def apply(self, logits: T_contra, context: SamplingContext) -> None: ...


class Sampler(Protocol[T_contra]):
    """Draws one token per row."""

    def assign(self, slot: int, config: SamplingConfig) -> None:
        """Use ``config`` for the rows of ``slot`` from now on."""
        ...

    def sample(self, logits: T_contra, context: SamplingContext) -> Sequence[TokenId | None]:
        """A token per row of ``logits`` [rows, vocabulary]; None for a row that holds NaN."""
        ...
