"""The pages that a sequence starts with: whose they are shared with, and what is in them already."""

from collections.abc import Container
from collections.abc import Sequence as Items

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.kv_cache import AllocationRequest, KvCacheFork, KvCacheHandle
from ferrum_rt.interfaces.model_executor import PageCopy, StepInput
from ferrum_rt.runtime.scheduling.pages import PagedKvCache
from ferrum_rt.runtime.scheduling.sequence import Sequence
from ferrum_rt.runtime.scheduling.sessions import Sessions
from ferrum_rt.runtime.scheduling.swapping import Swapping


def claim_pages(
    cache: PagedKvCache,
    sessions: Sessions,
    swapping: Swapping,
    sequence: Sequence,
    samples: Items[Sequence],
    too_fresh: Container[Sequence],
    step: StepInput,
) -> KvCacheHandle | None:
    """Room for all its tokens, or None if too few pages are free. It has in them what was swapped of it; else what another
    of its request's ``samples`` has computed of the prompt in an earlier step than this one (``too_fresh`` has not), all
    but its last token, whose logits are wanted; else what its session has, or the prefix cache if that has more."""
    request, num_prompt = sequence.request, len(sequence.request.token_ids)
    wanted = AllocationRequest(
        request_id=request.request_id,
        token_ids=sequence.tokens,
        num_tokens=len(sequence.tokens),
        salt=request.salt,
        reuse_prefix=not sequence.wants_scores,
    )
    if sequence in swapping:
        handle = cache.allocate(wanted)
        if handle is not None:
            swapping.swap_in(sequence, handle)
        return handle
    for other in samples if not sequence.num_outputs else ():
        if other.handle is not None and other.num_planned >= num_prompt and other not in too_fresh:
            sequence.num_cached_tokens = other.num_cached_tokens
            return _taken(cache.fork(other.handle, num_prompt - 1, room=num_prompt), step)
    has_session = request.session_id is not None and not sequence.wants_scores
    fork = sessions.resume(request, sequence.tokens, cache.num_hits(wanted)) if has_session else None
    handle = _taken(fork, step) or cache.allocate(wanted)
    if handle is None:
        return None
    if has_session and fork is None:
        sessions.bring_back(sequence, handle)
    if not sequence.num_outputs:
        sequence.num_cached_tokens = handle.num_cached_tokens
    return handle


def _taken(fork: KvCacheFork | None, step: StepInput) -> KvCacheHandle | None:
    """Its handle; what it needs copied is copied in this step."""
    if fork is None:
        return None
    if fork.copy is not None:
        step.copied.append(PageCopy(*fork.copy))
    return fork.handle


def check_fits(cache: PagedKvCache, prompt: int, max_tokens: int, *, max_model_len: int) -> None:
    """Raises RequestValidationError, with the numbers, for a request that an engine of this size could never run."""
    if prompt < 1:
        raise RequestValidationError("prompt has no tokens")
    if prompt + max_tokens > max_model_len:
        raise RequestValidationError(
            f"prompt ({prompt} tokens) + max_tokens ({max_tokens}) = {prompt + max_tokens} is more than the engine's "
            f"max_model_len of {max_model_len}; shorten the prompt or lower max_tokens"
        )
    pages = cache.pages_for(prompt + max_tokens)
    if pages > cache.num_pages:
        raise RequestValidationError(
            f"prompt ({prompt} tokens) + max_tokens ({max_tokens}) need {pages} KV pages of {cache.block_size} "
            f"tokens, and the engine has {cache.num_pages}; raise kv_cache.num_pages or ask for less"
        )
