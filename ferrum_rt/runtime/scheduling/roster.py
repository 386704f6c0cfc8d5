"""Where each sequence stands: held, waiting, running, parked, or at its end. Nobody else changes that."""

from ferrum_rt.interfaces.kv_cache import KvCacheHandle
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import RequestId
from ferrum_rt.runtime.scheduling.clients import Clients
from ferrum_rt.runtime.scheduling.residents import Residents
from ferrum_rt.runtime.scheduling.sequence import Sequence, SequenceState
from ferrum_rt.runtime.scheduling.sessions import Sessions
from ferrum_rt.runtime.scheduling.swapping import Swapping
from ferrum_rt.runtime.scheduling.waiting import WaitingQueue


class Roster:
    """``sequences`` are the samples of each request that have not ended; ``parked`` those of them that sit out."""

    def __init__(
        self, clients: Clients, waiting: WaitingQueue, residents: Residents, sessions: Sessions, swapping: Swapping
    ) -> None:
        self.sequences: dict[RequestId, list[Sequence]] = {}
        self.parked: dict[Sequence, None] = {}
        self.num_preemptions = 0
        self._displaced: dict[RequestId, None] = {}
        self._clients, self._waiting, self._residents = clients, waiting, residents
        self._sessions, self._swapping = sessions, swapping
        self._num_arrivals = 0

    def live(self, request: SequenceRequest) -> list[Sequence]:
        """The request's samples that have not ended."""
        samples = self.sequences.get(request.request_id, [])
        return list(samples) if samples and samples[0].request is request else []

    def samples(self, request_id: RequestId, index: int | None = None) -> list[Sequence]:
        """Those of the request of this name, or one of them, that have not ended."""
        return [sequence for sequence in self.sequences.get(request_id, ()) if index in (None, sequence.index)]

    def is_running(self, request_id: RequestId) -> bool:
        """One of its samples has a slot, and is to go on in it."""
        return any(sequence.state is SequenceState.RUNNING for sequence in self.sequences.get(request_id, ()))

    def take_displaced(self) -> list[RequestId]:
        """The requests that were made to wait since the last call, and do."""
        displaced = [request_id for request_id in self._displaced if not self.is_running(request_id)]
        self._displaced.clear()
        return displaced

    def arrive(self, request: SequenceRequest) -> None:
        """Its first sample waits, the others are held."""
        samples = [Sequence(request, self._num_arrivals + index, index) for index in range(request.num_samples)]
        self._num_arrivals += len(samples)
        self.sequences[request.request_id] = samples
        self._clients.arrive(request.client_id, len(samples))
        for sequence in samples[1:]:
            sequence.state = SequenceState.HELD
        self._wait(samples[0])

    def release_samples(self, first: Sequence) -> None:
        """The prompt of ``first`` is computed by the step just planned; from the next on its siblings can share it."""
        for sequence in reversed(self.sequences[first.request.request_id]):
            if sequence.state is SequenceState.HELD:
                self._wait(sequence)

    def admit(self, sequence: Sequence, handle: KvCacheHandle) -> int:
        """It was next, and runs in these pages and the slot that is returned."""
        self._waiting.admit(sequence)
        self._clients[sequence.request.client_id].num_queued_tokens -= len(sequence.request.token_ids)
        slot = self._residents.settle(sequence, handle)
        self._run(sequence)
        return slot

    def preempt(self, sequence: Sequence) -> None:
        """Slot and pages are others' from now on; it waits."""
        self._residents.running.remove(sequence)
        self._make_way(sequence)
        self._displace(sequence)

    def preempt_parked(self) -> bool:
        """Take slot and pages from who is parked and has any; False if nobody has."""
        for sequence in self.parked:
            if sequence.handle is not None:
                self._make_way(sequence)
                return True
        return False

    def take_back(self, sequence: Sequence) -> bool:
        """What steps that have not landed compute for it does not count; False if it had nothing of them."""
        is_swapped = sequence in self._swapping
        self._swapping.drop(sequence)
        if sequence.handle is None and not sequence.num_pending and not is_swapped:
            return False
        self._residents.release(sequence)
        if sequence.state is SequenceState.RUNNING:
            self._residents.running.remove(sequence)
            self._displace(sequence)
        sequence.num_pending = 0
        sequence.num_retries += 1
        return sequence.state is SequenceState.WAITING

    def park(self, request_id: RequestId) -> None:
        """What it holds stays with it until somebody waits for that."""
        for sequence in self.samples(request_id):
            if sequence.state not in (SequenceState.PARKED, SequenceState.HELD):
                self._leave(sequence)
                sequence.state = SequenceState.PARKED
                self.parked[sequence] = None

    def unpark(self, request_id: RequestId) -> None:
        """It runs or waits again."""
        for sequence in reversed(self.samples(request_id)):
            if sequence.state is SequenceState.PARKED:
                del self.parked[sequence]
                if sequence.handle is not None:
                    self._run(sequence)
                else:
                    self._wait(sequence)

    def finish(self, sequence: Sequence, *, ends_well: bool = False) -> None:
        """It holds nothing any more; what it has computed its session may have, if it ``ends_well``."""
        self._leave(sequence)
        self._swapping.drop(sequence)
        if ends_well and (handle := self._residents.leave(sequence)) is not None:
            self._sessions.take(sequence, handle)
        self._residents.release(sequence)
        sequence.state = SequenceState.FINISHED
        self._clients.leave(sequence.request.client_id)
        samples = self.sequences[sequence.request.request_id]
        samples.remove(sequence)
        if samples and all(other.state is SequenceState.HELD for other in samples):
            self._wait(samples[0])  # the one that was to compute their prompt is gone
        if not samples:
            del self.sequences[sequence.request.request_id]
            self._displaced.pop(sequence.request.request_id, None)
            self._sessions.settle(sequence.request)
        if not self.sequences:
            self._waiting.forget()

    def _make_way(self, sequence: Sequence) -> None:
        self._swapping.swap_out(sequence)
        self._residents.release(sequence)
        self.num_preemptions += 1

    def _displace(self, sequence: Sequence) -> None:
        self._displaced[sequence.request.request_id] = None
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self._waiting.push(sequence)
        self._clients[sequence.request.client_id].num_queued_tokens += len(sequence.request.token_ids)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        self._residents.join(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the list of those in its state."""
        match sequence.state:
            case SequenceState.RUNNING:
                self._residents.running.remove(sequence)
            case SequenceState.WAITING:
                self._waiting.remove(sequence)
                self._clients[sequence.request.client_id].num_queued_tokens -= len(sequence.request.token_ids)
            case SequenceState.PARKED:
                del self.parked[sequence]
