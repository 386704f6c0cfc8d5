"""What must hold, and what is raised where it does not."""

import enum


class Invariant(enum.StrEnum):
    """The first seven are the design's, by number."""

    LEDGER = "ledger: free + active + cached pages are all there are, and each is counted by the tables that hold it"
    ONE_END = "one end: every accepted request ends, once"
    CONTIGUOUS = "contiguous: no token is lost, none comes twice"
    SAME_OUTPUT = "same output: what the request gets alone"
    BOUNDED_WAIT = "bounded wait: nobody is starved"
    BOUNDED_MEMORY = "bounded memory: nothing is kept of a request that has ended"
    SAME_LOG = "same log: a seed gives the same events again"
    STEP = "step: only what the slots and the pages allow, within the budget"
    ISOLATION = "isolation: a request fails only by a fault of its own, or of a step that it had a part in"
    DEADLINE = "deadline: it ends its request when it has passed"
    FAIR = "fair: of two clients that wait, neither is served more than the other by more than the bound"
    NO_CRASH = "no crash: the scheduler raises nothing"


class Violation(Exception):
    """An invariant that does not hold after ``step`` steps of a seed."""

    def __init__(self, invariant: Invariant, detail: str, seed: int = 0, step: int = 0) -> None:
        super().__init__(invariant, detail, seed, step)
        self.invariant, self.detail, self.seed, self.step = invariant, detail, seed, step

    def __str__(self) -> str:
        return f"seed {self.seed}, step {self.step}: {self.detail} (violates {self.invariant})"
