"""What an engine says of itself."""

from collections.abc import Mapping

from ferrum_rt.interfaces.model_executor import ModelExecutor
from ferrum_rt.interfaces.types import (
    ComponentHealth,
    ComponentStatus,
    EngineState,
    EngineStatus,
    HealthStatus,
    RequestCounts,
    SchedulerStats,
)
from ferrum_rt.runtime.threads.worker import Worker


def engine_status(
    state: EngineState,
    executor: ModelExecutor,
    stats: SchedulerStats,
    counts: Mapping[str, int],
    *,
    num_active: int,
    uptime_s: float,
) -> EngineStatus:
    """``counts`` are the requests that have ended, by how; of the ``num_active`` the scheduler does not know all yet."""
    tokenizing = num_active - stats.running - stats.waiting - stats.parked
    return EngineStatus(
        state=state,
        model=executor.model_info,
        uptime_s=uptime_s,
        requests=RequestCounts(
            running=stats.running, waiting=stats.waiting + max(0, tokenizing), parked=stats.parked, **counts
        ),
        pages=stats.pages,
        memory=executor.memory_usage(),
    )


def engine_health(threads: Mapping[str, Worker], fault: str) -> HealthStatus:
    """A component for each thread, and the engine with its ``fault``, if it has one."""
    faults = {name: "" if thread.is_alive else "its thread has stopped" for name, thread in threads.items()}
    faults["engine"] = fault
    components = {name: ComponentHealth(healthy=not fault, detail=fault) for name, fault in faults.items()}
    return HealthStatus(healthy=not any(faults.values()), status=ComponentStatus(components=components))
