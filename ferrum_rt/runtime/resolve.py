"""From an InferenceRequest to what the scheduler needs: text as tokens, the model's and the engine's defaults filled in."""

from collections.abc import Sequence

import msgspec

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import RequestValidationError, Unsupported
from ferrum_rt.interfaces.grammar import Grammar
from ferrum_rt.interfaces.requests import is_token_ids
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.tokenizer import Tokenizer
from ferrum_rt.interfaces.types import ChatMessage, InferenceRequest, Prompt, SamplingParams, TokenId
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.text.tool_calls import tool_constraint


class EncodedRequest(msgspec.Struct, frozen=True):
    """A request with its texts as token ids."""

    request: InferenceRequest
    token_ids: list[TokenId]
    bad_words: list[list[TokenId]] = []


def encode(request: InferenceRequest, model: LoadedModel, config: EngineConfig) -> EncodedRequest:
    """Call it off the event loop, unless ``has_text`` says that there is none. Raises TokenizerError, and
    RequestValidationError for what the model's chat template refuses or token ids that the model does not have."""
    bad_words = request.sampling_params.bad_words
    if not has_text(request):
        return EncodedRequest(request, _known_ids(request.prompt, model))
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise RequestValidationError("prompt: this model was loaded without a tokenizer; send token ids, and no bad_words")
    if isinstance(request.prompt, str):
        token_ids = tokenizer.encode_batch(
            [request.prompt],
            add_special_tokens=config.model.tokenizer.add_special_tokens,
            parse_special_tokens=request.parse_special_tokens,
        )[0]
    elif is_token_ids(request.prompt):
        token_ids = _known_ids(request.prompt, model)
    else:
        messages = [message for message in request.prompt if isinstance(message, ChatMessage)]
        token_ids = tokenizer.encode_chat(messages, () if request.tool_choice == "none" else request.tools)
    return EncodedRequest(request, token_ids, _encode_words(bad_words or (), tokenizer))


def _known_ids(prompt: Prompt, model: LoadedModel) -> list[TokenId]:
    """A prompt of token ids, all of which the model has."""
    token_ids = [TokenId(token) for token in prompt if isinstance(token, int)]
    last = model.executor.model_info.vocab_size - 1
    if (highest := max(token_ids)) > last:
        raise RequestValidationError(f"prompt holds the token id {highest}, but the model's vocabulary ends at {last}")
    return token_ids


def has_text(request: InferenceRequest) -> bool:
    """Whether ``encode`` has to tokenize anything."""
    prompt = request.prompt
    return isinstance(prompt, str) or not is_token_ids(prompt) or bool(request.sampling_params.bad_words)


def is_constrained(request: InferenceRequest) -> bool:
    """Whether the output must have a form that ``compile_grammar`` is to be asked for."""
    given = request.sampling_params.response_format
    return (given is not None and given.type != "text") or (
        bool(request.tools) and request.tool_choice not in ("none", "auto")
    )


def compile_grammar(request: InferenceRequest, model: LoadedModel) -> Grammar:
    """What the output is constrained to: by its format, or by tools that must be called. Call it off the event loop. Raises
    RequestValidationError, and Unsupported where this model cannot be held to it."""
    given, tool_format = request.sampling_params.response_format, model.tool_format
    if model.tokenizer is None or model.grammars is None:
        raise Unsupported("response_format and tool_choice need a model with a tokenizer")
    if given is not None and given.type != "text":
        return model.grammars.compile(given)
    if tool_format is None:
        raise Unsupported("tool_choice: the model's chat template shows calls in no format that is known here; use 'auto'")
    special = _special_markers(tool_format.markers, model.tokenizer)
    constraint = tool_constraint(tool_format, request.tools, request.tool_choice, special)
    try:
        return model.grammars.compile(constraint)
    except RequestValidationError as error:
        fault = str(error).removeprefix("response_format: ")
        raise RequestValidationError(f"tools: their parameters cannot be made a grammar: {fault}") from error


def resolve(
    encoded: EncodedRequest, grammar: Grammar | None, model: LoadedModel, config: EngineConfig, submitted_at: float
) -> SequenceRequest:
    """The request with everything filled in that it left open. Raises RequestValidationError where that leaves too little
    room for its min_tokens."""
    info, request = model.executor.model_info, encoded.request
    params = request.sampling_params
    room = info.max_model_len - len(encoded.token_ids)
    eos = frozenset() if params.ignore_eos else model.eos_token_ids
    stop = frozenset(TokenId(token) for token in params.stop_token_ids)
    max_tokens = params.max_tokens or max(1, min(config.sampling.max_tokens, room))
    if params.min_tokens > max_tokens:
        raise RequestValidationError(
            f"min_tokens is {params.min_tokens}, but without max_tokens an output ends after {max_tokens}; set max_tokens"
        )
    return SequenceRequest(
        request_id=request.id,
        token_ids=encoded.token_ids,
        max_tokens=max_tokens,
        sampling=_sampling(encoded, grammar, model.defaults, eos | stop),
        eos_token_ids=eos,
        stop_token_ids=stop,
        priority=config.scheduler.policy(request.client_id).allowed(request.priority),
        client_id=request.client_id,
        submitted_at=submitted_at,
        deadline=None if request.deadline_s is None else submitted_at + request.deadline_s,
        salt=b"" if config.kv_cache.shared_prefixes else request.client_id.encode(),
        num_samples=params.n,
        prompt_logprobs=params.prompt_logprobs,
        session_id=request.session_id,
    )


def _sampling(
    encoded: EncodedRequest, grammar: Grammar | None, defaults: SamplingParams, end_token_ids: frozenset[TokenId]
) -> SamplingConfig:
    given = encoded.request.sampling_params

    def choose(name: str, neutral: float) -> float:
        for params in (given, defaults):
            value: float | None = getattr(params, name)
            if value is not None:
                return value
        return neutral

    assert given.seed is not None  # build_request chooses one
    return SamplingConfig(
        temperature=choose("temperature", 1.0),
        # Mirostat sets a bound of its own; the model's recommendations are for those who do not ask for it.
        top_p=1.0 if given.mirostat else choose("top_p", 1.0),
        top_k=0 if given.mirostat else int(choose("top_k", 0)),
        min_p=0.0 if given.mirostat else choose("min_p", 0.0),
        typical_p=given.typical_p,
        mirostat=given.mirostat,
        repetition_penalty=choose("repetition_penalty", 1.0),
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        logit_bias=given.logit_bias or {},
        allowed_token_ids=given.allowed_token_ids,
        bad_words=encoded.bad_words,
        min_tokens=given.min_tokens,
        end_token_ids=end_token_ids,
        logprobs=given.logprobs,
        grammar=grammar,
        processors=encoded.request.logits_processors,
        seed=given.seed,
    )


def _encode_words(words: Sequence[str], tokenizer: Tokenizer) -> list[list[TokenId]]:
    """Each word as it is written at the start of a text and after a space."""
    variants = [variant for word in words for variant in (word, " " + word.lstrip())]
    encoded = tokenizer.encode_batch(variants, add_special_tokens=False)
    return [list(ids) for ids in dict.fromkeys(map(tuple, encoded)) if ids]


def _special_markers(markers: Sequence[str], tokenizer: Tokenizer) -> dict[str, int]:
    """The markers that are special tokens, and so cannot be written as text."""
    parsed = tokenizer.encode_batch(markers, add_special_tokens=False, parse_special_tokens=True)
    as_text = tokenizer.encode_batch(markers, add_special_tokens=False)
    together = zip(markers, parsed, as_text, strict=True)
    return {marker: ids[0] for marker, ids, text in together if len(ids) == 1 and ids != text}
