"""Names of what is traced and measured. Those under ``gen_ai`` are OpenTelemetry's conventions for generative AI, copied
here because their Python package is still marked as incubating; those under ``ferrum`` are ours."""

import enum

SCOPE = "ferrum_rt"
PROVIDER = "ferrum_rt"


class Phase(enum.StrEnum):
    """Where a request is; its span's children bear these names. It is in one of them at any time, from admission to end:

    ``queue`` (tokenizer, grammar compiler, no slot yet), ``prefill`` (its prompt, or after a preemption everything again, up
    to the next token), ``decode``, ``parked`` (its reader is slow) and ``preempted`` (slot and pages are others')."""

    QUEUE = "queue"
    PREFILL = "prefill"
    DECODE = "decode"
    PARKED = "parked"
    PREEMPTED = "preempted"


# -- spans ----------------------------------------------------------------------------------------------------------------

CHAT, TEXT_COMPLETION = "chat", "text_completion"  # operations; a request's span is "OPERATION MODEL"
STEP = "engine step"
CHUNK_EVENT = "chunk"  # of prefill: tokens of the prompt that a step computes

OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
TOP_K = "gen_ai.request.top_k"
SEED = "gen_ai.request.seed"
CHOICE_COUNT = "gen_ai.request.choice.count"
CONVERSATION_ID = "gen_ai.conversation.id"
RESPONSE_ID = "gen_ai.response.id"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"
ERROR_TYPE = "error.type"

CLIENT = "ferrum.client.id"
PRIORITY = "ferrum.priority"
CHUNK_TOKENS = "ferrum.chunk.tokens"
CHUNK_POSITION = "ferrum.chunk.position"
STEP_DECODES = "ferrum.step.decodes"
STEP_PREFILLS = "ferrum.step.prefills"
STEP_PREFILL_TOKENS = "ferrum.step.prefill_tokens"
STEP_ROUNDS = "ferrum.step.rounds"
STEP_RUNNING = "ferrum.step.running"
STEP_WAITING = "ferrum.step.waiting"
STEP_PARKED = "ferrum.step.parked"
STEP_PAGES_FREE = "ferrum.step.pages.free"
STEP_PAGES_ACTIVE = "ferrum.step.pages.active"
STEP_PAGES_CACHED = "ferrum.step.pages.cached"

# -- metrics --------------------------------------------------------------------------------------------------------------

REQUEST_DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
# The conventions' bounds of buckets, in seconds.
DURATION_BOUNDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

ENGINE = "ferrum.engine"  # which of the process's engines, from 1
STATE = "ferrum.state"
OUTCOME = "ferrum.outcome"
EXPORTER = "ferrum.exporter"  # which of the daemon's, by the field of its configuration: otlp or spans

REQUESTS = "ferrum.requests"
REQUESTS_ENDED = "ferrum.requests.ended"
PREEMPTIONS = "ferrum.preemptions"
PAGES = "ferrum.kv_cache.pages"
PROMPT_TOKENS = "ferrum.prompt.tokens"
PROMPT_TOKENS_CACHED = "ferrum.prompt.cached_tokens"
PREFIX_HIT_RATE = "ferrum.prefix_cache.hit_rate"
GENERATED_TOKENS = "ferrum.output.tokens"
STEPS = "ferrum.steps"
STEP_TIME = "ferrum.step.time"
HOST_TIME = "ferrum.host.time"
LOOP_LAG = "ferrum.loop.lag"
LONGEST_LOOP_LAG = "ferrum.loop.lag.max"
SPANS_DROPPED = "ferrum.telemetry.spans.dropped"
