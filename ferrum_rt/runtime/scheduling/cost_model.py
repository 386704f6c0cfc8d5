"""How long a step takes, learnt from the steps so far: least squares over what a step computes, forgetting slowly."""

from typing import NamedTuple

from ferrum_rt.interfaces.model_executor import UnifiedBatch

_FORGET = 0.99  # what an observation still counts for after another: those of about the last 100 steps matter
_SOLVE_EVERY = 16
_MIN_OBSERVATIONS = 16
_OUTLIER = 4.0  # times what was predicted: the host has slept, or somebody compiled a kernel
_MAX_OUTLIERS = 8  # in a row; then it is the machine that has changed
_RIDGE = 1e-6
# Units in which the shares of a step's time are alike, for the sake of the arithmetic.
_TOKENS, _SEQUENCES, _CONTEXT = 64, 16, 4096


class StepWork(NamedTuple):
    """What a step computes: tokens, sequences, and the tokens that attention looks back on, its own too."""

    num_tokens: int
    num_sequences: int
    num_context: int

    @classmethod
    def of(cls, batch: UnifiedBatch) -> "StepWork":
        """Of each of its rounds."""
        decodes, prefills, num_tokens = batch.decodes, batch.prefills, batch.num_tokens
        before = sum(item.position for item in decodes) + sum(item.start for item in prefills)
        return cls(num_tokens, len(decodes) + len(prefills), before + num_tokens)

    @property
    def features(self) -> tuple[float, float, float, float]:
        """For the least squares."""
        return (1.0, self.num_tokens / _TOKENS, self.num_sequences / _SEQUENCES, self.num_context / _CONTEXT)


class CostModel:
    """seconds = base + a * tokens + b * sequences + c * context, none of them negative. It says nothing (0.0) before it has
    seen enough."""

    def __init__(self) -> None:
        self._products = [[0.0] * 4 for _ in range(4)]
        self._targets = [0.0] * 4
        self._num_observed = self._num_outliers = 0
        self.coefficients = [0.0] * 4

    @property
    def is_fitted(self) -> bool:
        return self._num_observed >= _MIN_OBSERVATIONS

    @property
    def per_unit(self) -> tuple[float, float, float, float]:
        """Seconds for a step, and per token, sequence and token of context in it."""
        base, tokens, sequences, context = self.coefficients
        return (base, tokens / _TOKENS, sequences / _SEQUENCES, context / _CONTEXT)

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step has taken so long."""
        if self.is_fitted and seconds > _OUTLIER * self.predict(work) and self._num_outliers < _MAX_OUTLIERS:
            self._num_outliers += 1
            return
        self._num_outliers = 0
        features = work.features
        for row, left in zip(self._products, features, strict=True):
            for column, right in enumerate(features):
                row[column] = _FORGET * row[column] + left * right
        self._targets = [_FORGET * old + feature * seconds for old, feature in zip(self._targets, features, strict=True)]
        self._num_observed += 1
        if self._num_observed % _SOLVE_EVERY == 0:
            self._solve()

    def predict(self, work: StepWork) -> float:
        """Seconds that a step with this work is expected to take."""
        return sum(weight * feature for weight, feature in zip(self.coefficients, work.features, strict=True))

    def tokens_within(self, seconds: float, work: StepWork) -> int:
        """How many tokens may join a step with this work so that it takes no longer; at most 2**31."""
        per_token = self.per_unit[1]
        room = seconds - self.predict(work)
        if per_token <= 0 or room > per_token * 2**31:
            return 2**31
        return max(0, int(room / per_token))

    def _solve(self) -> None:
        """What comes out negative is left out, and the rest solved again."""
        used = [0, 1, 2, 3]
        while used:
            found = _solve(
                [[self._products[i][j] + _RIDGE * (i == j) for j in used] for i in used], [self._targets[i] for i in used]
            )
            kept = [index for index, value in zip(used, found, strict=True) if value >= 0]
            if kept == used:
                self.coefficients = [0.0] * 4
                for index, value in zip(used, found, strict=True):
                    self.coefficients[index] = value
                return
            used = kept


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss' elimination of a positive definite system."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for pivot, row in enumerate(rows):
        for other in rows[pivot + 1 :]:
            factor = other[pivot] / row[pivot]
            for column in range(pivot, len(row)):
                other[column] -= factor * row[column]
    found = [0.0] * len(rows)
    for index in range(len(rows) - 1, -1, -1):
        row = rows[index]
        rest = sum(row[column] * found[column] for column in range(index + 1, len(rows)))
        found[index] = (row[-1] - rest) / row[index]
    return found
