"""A scheduler's work as data, to look at, or for another scheduler to go on with."""

from collections.abc import Iterable, Mapping

from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import SavedRequest, SavedState, SequenceRequest
from ferrum_rt.interfaces.types import ClientId, Priority
from ferrum_rt.runtime.scheduling.sequence import Sequence, SequenceState


def save(groups: Iterable[list[Sequence]], served: Mapping[Priority, Mapping[ClientId, float]], now: float) -> SavedState:
    """``groups`` are the samples of each request."""
    requests = [_save(samples, now) for samples in groups]
    return SavedState(
        requests=sorted(requests, key=lambda request: request.submitted_s),
        served={priority.name.lower(): dict(counters) for priority, counters in served.items()},
    )


def _save(samples: list[Sequence], now: float) -> SavedRequest:
    request = samples[0].request
    num_prompt = len(request.token_ids)
    return SavedRequest(
        request_id=request.request_id,
        token_ids=request.token_ids,
        outputs={sequence.index: sequence.tokens[num_prompt:] for sequence in samples},
        max_tokens=request.max_tokens,
        eos_token_ids=request.eos_token_ids,
        stop_token_ids=request.stop_token_ids,
        num_samples=request.num_samples,
        priority=request.priority,
        client_id=request.client_id,
        session_id=request.session_id,
        salt=request.salt,
        submitted_s=request.submitted_at - now,
        deadline_s=None if request.deadline is None else request.deadline - now,
        is_parked=all(sequence.state is SequenceState.PARKED for sequence in samples),
    )


def restored(saved: SavedRequest, now: float) -> SequenceRequest:
    """The request, as if it came now, and greedy: how it is sampled was not saved, for processors are the caller's own."""
    return SequenceRequest(
        request_id=saved.request_id,
        token_ids=saved.token_ids,
        max_tokens=saved.max_tokens,
        sampling=SamplingConfig(),
        eos_token_ids=saved.eos_token_ids,
        stop_token_ids=saved.stop_token_ids,
        priority=saved.priority,
        client_id=saved.client_id,
        submitted_at=now + saved.submitted_s,
        deadline=None if saved.deadline_s is None else now + saved.deadline_s,
        num_samples=saved.num_samples,
        session_id=saved.session_id,
        salt=saved.salt,
    )
