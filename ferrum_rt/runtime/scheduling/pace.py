"""What follows from how long steps take: tokens beside decodes, the soonest a prompt can be done, how long others wait."""

from collections.abc import Sequence

from ferrum_rt.interfaces.config import SchedulerConfig
from ferrum_rt.runtime.scheduling.cost_model import CostModel, StepWork

_MEAN_OF = 64  # requests that the mean length of an output is about


class Pace:
    """Learns from each step, and from each output's length."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.costs = CostModel()
        self._mean_outputs = 0.0

    def observe(self, work: StepWork, step_s: float) -> None:
        """A step took so long."""
        self.costs.observe(work, step_s)

    def ended(self, num_outputs: int) -> None:
        """An output came to so many tokens."""
        self._mean_outputs += (num_outputs - self._mean_outputs) / _MEAN_OF

    def prefill_budget(self, max_tokens: int, decodes: StepWork) -> int:
        """How many tokens of prompts a step may have beside these decodes, of ``max_tokens`` in all."""
        room = max_tokens - decodes.num_tokens
        if not decodes.num_tokens or not self.costs.is_fitted:
            return room
        wanted = self.costs.tokens_within(self.config.itl_target_s, decodes)
        return min(room, max(self.config.min_prefill_tokens, wanted))

    def num_rounds(self, work: StepWork, seconds: float) -> int:
        """How many rounds of this work fit in so many seconds, at least 1; 1 as long as it is not known what it takes."""
        round_s = self.costs.predict(work) if self.costs.is_fitted else 0.0
        return max(1, int(seconds / round_s)) if round_s > 0 else 1

    def soonest(self, num_prompt: int) -> float:
        """Seconds that a prompt takes when it has the engine for itself."""
        return self.costs.predict(StepWork(num_prompt, 1, num_prompt))

    def wait_s(self, num_waiting: int, num_tokens: int, contexts: Sequence[int]) -> float:
        """Seconds that waiting requests with so many tokens of prompts take, beside running ones that look back on
        ``contexts`` tokens."""
        batch = max(1, len(contexts))
        prompts = self.costs.predict(StepWork(num_tokens, num_waiting, num_tokens))
        step = self.costs.predict(StepWork(batch, batch, sum(contexts)))
        return prompts + step / batch * num_waiting * self._mean_outputs
