"""What the scheduler says of itself."""

from collections import Counter

from ferrum_rt.interfaces.types import ClientDiagnostics, SchedulerDiagnostics
from ferrum_rt.runtime.scheduling.clients import Clients
from ferrum_rt.runtime.scheduling.pace import Pace
from ferrum_rt.runtime.scheduling.residents import Residents
from ferrum_rt.runtime.scheduling.trials import Trials
from ferrum_rt.runtime.scheduling.waiting import WaitingQueue


def diagnose(
    clients: Clients, queue: WaitingQueue, pace: Pace, trials: Trials, estimated_wait_s: float
) -> SchedulerDiagnostics:
    """In time linear in what is alive."""
    waiting = Counter(sequence.request.client_id for sequence in queue)
    served = queue.counters()
    found = {
        client_id: ClientDiagnostics(
            num_live=client.num_live,
            num_waiting=waiting[client_id],
            num_running=client.num_running,
            num_pages=client.num_pages,
            num_queued_tokens=client.num_queued_tokens,
            served={priority.name.lower(): own[client_id] for priority, own in served.items() if client_id in own},
            generated_tokens=client.num_generated,
        )
        for client_id, client in clients.items()
    }
    return SchedulerDiagnostics(
        clients=found,
        waiting={priority.name.lower(): count for priority, count in queue.counts().items()},
        step_cost=pace.costs.per_unit,
        estimated_wait_s=estimated_wait_s,
        on_trial=list(dict.fromkeys(sequence.request.request_id for sequence in trials.current())),
    )


def estimate_wait(clients: Clients, queue: WaitingQueue, pace: Pace, residents: Residents) -> float:
    """Seconds that those who wait will keep the engine busy."""
    num_tokens = sum(client.num_queued_tokens for _, client in clients.items())
    contexts = [sequence.length for sequence in residents.running]
    return pace.wait_s(len(queue), num_tokens, contexts)
