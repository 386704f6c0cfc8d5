"""From a tokenized InferenceRequest to what the scheduler needs: the model's and the engine's defaults filled in."""

import secrets
from collections.abc import Sequence

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import InferenceRequest, SamplingParams, TokenId
from ferrum_rt.runtime.loader import LoadedModel


def resolve(
    request: InferenceRequest, token_ids: Sequence[TokenId], model: LoadedModel, config: EngineConfig, submitted_at: float
) -> SequenceRequest:
    """Raises RequestValidationError for a token id that the model does not have."""
    info, params = model.executor.model_info, request.sampling_params
    for token_id in token_ids:
        if token_id >= info.vocab_size:
            raise RequestValidationError(
                f"prompt holds the token id {token_id}, but the model's vocabulary ends at {info.vocab_size - 1}"
            )
    room = info.max_model_len - len(token_ids)
    max_tokens = params.max_tokens or max(1, min(config.sampling.max_tokens, room))
    return SequenceRequest(
        request_id=request.id,
        token_ids=list(token_ids),
        max_tokens=max_tokens,
        sampling=_sampling(params, model.defaults),
        eos_token_ids=frozenset() if params.ignore_eos else model.eos_token_ids,
        stop_token_ids=frozenset(TokenId(token) for token in params.stop_token_ids),
        priority=request.priority,
        deadline=None if request.deadline_s is None else submitted_at + request.deadline_s,
        salt=b"" if config.kv_cache.shared_prefixes else request.client_id.encode(),
    )


def _sampling(given: SamplingParams, defaults: SamplingParams) -> SamplingConfig:
    def choose(name: str, neutral: float) -> float:
        for params in (given, defaults):
            value: float | None = getattr(params, name)
            if value is not None:
                return value
        return neutral

    return SamplingConfig(
        temperature=choose("temperature", 1.0),
        top_p=choose("top_p", 1.0),
        top_k=int(choose("top_k", 0)),
        min_p=choose("min_p", 0.0),
        seed=secrets.randbits(63) if given.seed is None else given.seed,
    )
