"""The CUDA executor under random schedules; ``python -m tests.runtime.execution.cuda_schedules 10000`` is the long form."""

import pytest

from tests.runtime.execution.cuda_schedules import Machine, check


@pytest.mark.slow
def test_random_schedules_through_the_executor() -> None:
    """Whatever is submitted, cancelled, parked and preempted in whatever order, on a device that is as late as it can be:
    each sample gets the tokens that it would get alone, and the page ledger is exact after each step."""
    machine = Machine()
    try:
        for seed in range(25):
            check(machine, seed)
        assert all(graph.num_replays > 10 for graph in machine.device.graphs), "a size was never put to the test"
    finally:
        machine.close()
