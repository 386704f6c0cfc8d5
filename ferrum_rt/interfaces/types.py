"""Ids, requests, responses and reports: what passes between a caller and an engine."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NewType

import msgspec

RequestId = NewType("RequestId", str)
TokenId = NewType("TokenId", int)
BatchId = NewType("BatchId", int)
ClientId = NewType("ClientId", str)
SessionId = NewType("SessionId", str)
TaskId = NewType("TaskId", str)
ModelId = NewType("ModelId", str)

DEFAULT_CLIENT = ClientId("default")


class DataType(enum.StrEnum):
    """Element type of weights and activations. With ``int8`` activations are bfloat16, and linear layers (but for the router
    of a mixture of experts) multiply in int8: see TensorOps.pack_linear."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class Device(enum.StrEnum):
    """Where the model runs. ``auto`` takes CUDA where there is a GPU, else the CPU."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class FinishReason(enum.StrEnum):
    """Why a generation ended. ``stop`` is a stop string or stop token, ``eos`` the model's own end token."""

    LENGTH = "length"
    STOP = "stop"
    EOS = "eos"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


class Priority(enum.IntEnum):
    """Urgency of a request; a higher one is admitted first and preempted last."""

    LOW = 0
    NORMAL = 1
    HIGH = 2
    CRITICAL = 3


class ModelSource(enum.StrEnum):
    """Where a model's files come from."""

    DEMO = "demo"
    DIRECTORY = "directory"
    HUB = "hub"


class ModelType(enum.StrEnum):
    """The decoder families, by the ``model_type`` of their config.json."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    PHI3 = "phi3"
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3_text"
    MIXTRAL = "mixtral"
    QWEN3_MOE = "qwen3_moe"


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function to call; ``arguments`` is a JSON object, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model asks for. The message with its result refers to it by ``id``."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to the output's call number ``index``: its ``id`` and ``name`` come once, at its start, and the
    text of its arguments in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """Something the model may use; the shape is OpenAI's."""

    function: ToolFunction
    type: Literal["function"] = "function"


class FunctionName(msgspec.Struct, frozen=True, kw_only=True):
    """Names one of a request's functions."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """A ``tool_choice`` that leaves no choice."""

    function: FunctionName
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool
"""Whether the model may call tools, must call at least one, or must call that one."""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation; the model's chat template turns a list of them into a prompt. An assistant's turn may have
    ``tool_calls``; a turn with role ``tool`` holds the result of the call ``tool_call_id``."""

    role: str
    content: str = ""
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None


Prompt = str | Sequence[int | ChatMessage | Mapping[str, Any]]
"""What a caller may write: text, token ids, or chat messages, also as dicts in OpenAI's shape (a sequence holds either ids
or messages, never both)."""


class Mirostat(msgspec.Struct, frozen=True, kw_only=True):
    """Mirostat v2 (arXiv:2007.14966): keeps the surprise of sampled tokens near ``tau`` bits, learning at rate ``eta``."""

    tau: float = 5.0
    eta: float = 0.1


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Shape the output must have. ``definition`` is the JSON schema (a dict, or its text), the regular expression, or the
    grammar in the Lark syntax that llguidance takes; ``text`` and ``json_object`` have none."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = "text"
    definition: str | dict[str, Any] | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop. A field left at None takes the model's generation_config.json, else neutral.

    Probabilities are in [0, 1]; ``temperature`` 0 is greedy; ``top_k`` 0 keeps every token.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False
    response_format: ResponseFormat | None = None
    mirostat: Mirostat | None = None


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One generation to do. ``deadline_s`` counts seconds from submission; ``client_id`` is who pays for it.

    An ``id`` that is left empty is chosen by the engine. ``tools`` are for chat messages alone. Special tokens that are
    written out in a text prompt are text like any other, unless ``parse_special_tokens`` is set; those in the content of
    chat messages always are. ``logits_processors`` (LogitsProcessor) work in-process only.
    """

    prompt: str | Sequence[int | ChatMessage]
    id: RequestId = RequestId("")
    model_id: ModelId | None = None
    sampling_params: SamplingParams = SamplingParams()
    priority: Priority = Priority.NORMAL
    client_id: ClientId = DEFAULT_CLIENT
    session_id: SessionId | None = None
    deadline_s: float | None = None
    metadata: dict[str, str] = {}
    tools: list[Tool] = []
    tool_choice: ToolChoice = "auto"
    parse_special_tokens: bool = False
    logits_processors: list[Any] = []


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request from without: when it comes, in seconds from the first, and how large it is. Its ``deadline_s`` counts from
    then; ``output_tokens`` are those of all its samples. A trace is one of these a line, as JSON."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    client: ClientId = DEFAULT_CLIENT
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Token counts of one request. ``cached_tokens`` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Logprob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A token and the natural logarithm of the model's probability for it, before any SamplingParams. ``token`` is its
    text, with U+FFFD for bytes that are no whole character."""

    token_id: TokenId
    token: str
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One token of a text, which begins ``offset`` bytes (UTF-8) into that text, and beside it the likeliest tokens, best
    first. The first token of a prompt has no ``logprob``: nothing comes before it."""

    token_id: TokenId
    token: str
    logprob: float | None
    offset: int
    top: list[Logprob]


class StreamChunk(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What one step added to the output number ``index``. The last chunk of an output has a ``finish_reason`` and ``usage``,
    and says the ``seed``. ``prompt_logprobs`` come once, with the first chunk. With ``tools`` the text of a call is not in
    ``text`` but in ``tool_calls``. Most fields of most chunks are at their default, and are not written."""

    request_id: RequestId
    index: int = 0
    text: str = ""
    token_ids: list[TokenId] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: Sequence[ToolCallDelta] = ()
    prompt_logprobs: list[TokenLogprobs] | None = None
    seed: int | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One of the ``n`` outputs of a request."""

    index: int
    text: str
    token_ids: list[TokenId]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    tool_calls: list[ToolCall] = []


class RequestMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from submission: until the first step that ran it, until its first token, until its end."""

    queue_s: float
    ttft_s: float
    total_s: float


class InferenceResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A finished generation. ``outputs`` holds all ``n``; the fields beside it are the first's, but for ``usage``, which
    counts the tokens of all. The ``seed`` gives the same outputs again."""

    request_id: RequestId
    text: str
    token_ids: list[TokenId]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    outputs: list[Output] = []
    metrics: RequestMetrics | None = None
    tool_calls: list[ToolCall] = []
    prompt_logprobs: list[TokenLogprobs] | None = None
    seed: int | None = None


class SpecialTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens with a meaning of their own; a model may have several that end a text."""

    bos: TokenId | None = None
    eos: tuple[TokenId, ...] = ()
    pad: TokenId | None = None


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The loaded model. ``num_parameters`` counts a tied embedding once."""

    id: ModelId
    type: ModelType
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_model_len: int
    dtype: DataType
    device: Device


class EngineState(enum.StrEnum):
    """The life of an engine."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by what became of them; the first three are now, the others since the start."""

    running: int
    waiting: int
    parked: int
    finished: int
    failed: int
    cancelled: int
    rejected: int


class MemoryPressure(enum.IntEnum):
    """How full the pages are of what live requests hold: less than 70 %, 85 %, 95 %, or more."""

    LOW = 0
    MODERATE = 1
    HIGH = 2
    CRITICAL = 3


class PageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """KV pages by state: total = free + active (held by a live request) + cached (held by the prefix cache or by
    sessions between their turns)."""

    total: int
    free: int
    active: int
    cached: int


class MemoryUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes."""

    weights: int
    kv_cache: int


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine."""

    state: EngineState
    model: ModelInfo | None
    uptime_s: float
    requests: RequestCounts
    pages: PageCounts
    memory: MemoryUsage


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's queues and what it has done since the start."""

    running: int
    waiting: int
    parked: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    pages: PageCounts


class ClientDiagnostics(msgspec.Struct, frozen=True, kw_only=True):
    """What one client has in the scheduler: sequences that are alive, those of them that wait and those that have a slot,
    the pages these hold, the tokens of prompts that wait, and those that were generated for it since it last had nothing
    under way. ``served`` is weighted tokens of service by priority, where clients compete."""

    num_live: int
    num_waiting: int
    num_running: int
    num_pages: int
    num_queued_tokens: int
    served: dict[str, float]
    generated_tokens: int


class SchedulerDiagnostics(msgspec.Struct, frozen=True, kw_only=True):
    """Why the scheduler does what it does. A step is expected to take ``step_cost``: seconds for itself, per token, per
    sequence, and per token of context; those who wait keep the engine busy for ``estimated_wait_s``. ``on_trial`` requests
    run alone, to find which of them makes steps fail."""

    clients: dict[ClientId, ClientDiagnostics]
    waiting: dict[str, int]
    step_cost: tuple[float, float, float, float]
    estimated_wait_s: float
    on_trial: list[RequestId]


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the start. ``step_s`` is time in the executor, ``host_s`` time spent planning and committing.
    ``loop_lag_s`` is by how much the event loop was late, in all, for what was ready for it, ``max_loop_lag_s`` at the
    worst."""

    steps: int
    step_s: float
    host_s: float
    scheduler: SchedulerStats
    loop_lag_s: float = 0.0
    max_loop_lag_s: float = 0.0


class ComponentHealth(msgspec.Struct, frozen=True, kw_only=True):
    """One component; ``detail`` says what is wrong with an unhealthy one."""

    healthy: bool
    detail: str = ""


class ComponentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Health by component name."""

    components: dict[str, ComponentHealth]


class HealthStatus(msgspec.Struct, frozen=True, kw_only=True):
    """``healthy`` when every component is."""

    healthy: bool
    status: ComponentStatus


def to_builtins(value: msgspec.Struct) -> dict[str, Any]:
    """The Struct as plain dicts and lists, ready for JSON."""
    result: dict[str, Any] = msgspec.to_builtins(value)
    return result
