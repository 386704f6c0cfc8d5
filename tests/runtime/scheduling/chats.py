"""Turns of sessions on a schedule that is stepped by hand."""

from typing import Any

from ferrum_rt.interfaces.model_executor import StepInput
from ferrum_rt.interfaces.types import FinishReason, PageCounts, RequestId
from tests.runtime.scheduling.schedules import Schedule


class Chat:
    """A schedule, and what it copied and computed for each request. Pages have 4 tokens, prefixes are not cached."""

    def __init__(self, **fields: Any) -> None:
        fields.setdefault("prefix_caching", False)
        self.schedule = Schedule(fails=self._look, **fields)
        self.sessions = self.schedule.scheduler.sessions
        self.num_copies = self.num_prefilled = 0
        self._num_turns = 0

    @property
    def pages(self) -> PageCounts:
        return self.schedule.cache.statistics().pages

    def turn(self, prompt: list[int], max_tokens: int = 6, session: str = "chat", **fields: Any) -> list[int]:
        """Run a request to its end; the session's text after it, all tokens being right."""
        self.num_copies = self.num_prefilled = 0
        name = self.begin(prompt, max_tokens, session, **fields)
        self.schedule.run()
        self.schedule.check_tokens()
        assert self.schedule.ends[name] is FinishReason.LENGTH
        return prompt + list(self.schedule.tokens[name])

    def begin(self, prompt: list[int], max_tokens: int = 6, session: str = "chat", **fields: Any) -> RequestId:
        self._num_turns += 1
        return self.schedule.submit(f"r{self._num_turns}", prompt=prompt, max_tokens=max_tokens, session=session, **fields)

    def spoil(self, prompt: list[int], max_tokens: int, after_steps: int, *, is_cancelled: bool) -> None:
        """Run a request that is cancelled after so many steps, or fails."""
        name = self.begin(prompt, max_tokens)
        for _ in range(after_steps):
            self.schedule.step()
        if is_cancelled:
            self.schedule.scheduler.cancel(name)
        else:
            self.schedule.executor.nan_requests.add(name)
        self.schedule.run()

    def _look(self, step: StepInput) -> bool:
        self.num_copies += len(step.copied)
        self.num_prefilled += sum(len(item.token_ids) for item in step.batch.prefills)
        return False
