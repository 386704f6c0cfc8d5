"""A ModelExecutor without a model, over the simulation's DigestMemory, and a tokenizer of bytes."""

import codecs
import mmap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import TokenizerError
from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.tokenizer import TokenizerInfo
from ferrum_rt.interfaces.types import (
    ChatMessage,
    DataType,
    Device,
    MemoryUsage,
    ModelId,
    ModelInfo,
    ModelType,
    RequestId,
    SamplingParams,
    SpecialTokens,
    TokenId,
    Tool,
)
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.simulation.digests import Answer, DigestMemory, printable
from ferrum_rt.runtime.threads.worker import finished

EOS = TokenId(256)
VOCAB_SIZE = 257
MAX_MODEL_LEN = 1024


def mapped_clock(path: str) -> "memoryview[float]":
    """A file with room for one double, shared with all that map it."""
    with open(path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8)).cast("d")


def fake_model(config: EngineConfig, executor: "FakeExecutor | None" = None) -> LoadedModel:
    """Give it to a Runtime as its ``load``; bind ``executor`` to keep hold of it."""
    return LoadedModel(
        executor=executor or FakeExecutor(config),
        tokenizer=ByteTokenizer(),
        eos_token_ids=frozenset({EOS}),
        defaults=SamplingParams(),
    )


class FakeExecutor:
    """Sleeps ``step_s`` in each step, raises in the steps numbered in ``fail_at`` (from 1), and samples NaN (None) for
    the requests in ``nan_requests``. ``on_step`` is called first, with the step's number, in the executor's thread.
    ``clock`` is a file to which it writes when its last step ended, a double of time.perf_counter's, for whoever has it
    mapped."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        answer: Answer = printable,
        step_s: float = 0.0,
        fail_at: set[int] | None = None,
        nan_requests: set[RequestId] | None = None,
        on_step: Callable[[int, StepInput], None] | None = None,
        clock: str | None = None,
        max_rounds: int = 1,
    ) -> None:
        self.num_slots = config.scheduler.max_running_requests
        self.num_steps = 0
        self.is_closed = False
        self.step_s = step_s
        self.fail_at = fail_at or set()
        self.nan_requests = nan_requests or set()
        self._on_step = on_step
        self._clock = None if clock is None else mapped_clock(clock)
        block_size = config.kv_cache.block_size
        wanted_len = config.model.max_model_len or MAX_MODEL_LEN
        self.num_pages = config.kv_cache.num_pages or self.num_slots * -(-wanted_len // block_size)
        self.page_bytes = 1
        self.max_rounds = max_rounds
        self.num_host_pages = config.memory.swap_bytes or 0
        self._memory = DigestMemory(self.num_slots, self.num_pages, block_size, answer)
        self.model_info = ModelInfo(
            id=ModelId("fake"),
            type=ModelType.LLAMA,
            num_parameters=0,
            num_layers=0,
            hidden_size=0,
            vocab_size=VOCAB_SIZE,
            max_model_len=min(wanted_len, self.num_pages * block_size),
            dtype=DataType.FLOAT32,
            device=Device.CPU,
        )

    def execute(self, step: StepInput) -> Future[StepOutput]:
        self.num_steps += 1
        number = self.num_steps
        if self._on_step is not None:
            self._on_step(number, step)
        # All of it, so that the step that is already planned behind this one finds its slots where it expects them.
        output = self._memory.execute(step, nan=self.nan_requests, damaged=number in self.fail_at)
        if self.step_s:
            time.sleep(self.step_s)
        if self._clock is not None:
            self._clock[0] = time.perf_counter()
        if number in self.fail_at:
            raise RuntimeError(f"step {number} was told to fail")
        return finished(output)

    def close(self) -> None:
        self.is_closed = True
        if self._clock is not None:
            self._clock.release()

    def memory_usage(self) -> MemoryUsage:
        return MemoryUsage(weights=0, kv_cache=0)


class ByteTokenizer:
    """Token i is the byte i; EOS ends a text, and reads "<eos>" where special tokens are not skipped."""

    info = TokenizerInfo(vocab_size=VOCAB_SIZE, special_tokens=SpecialTokens(eos=(EOS,)), chat_template="fake")

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool, parse_special_tokens: bool = False
    ) -> list[list[TokenId]]:
        try:
            return [_tokens(text, parse_special_tokens) for text in texts]
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text cannot be tokenized: {error}") from None

    def encode_chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[TokenId]:
        """The names of the tools in a line, then each message in one."""
        names = f"tools: {', '.join(tool.function.name for tool in tools)}\n" if tools else ""
        turns = "".join(f"{message.role}: {message.content}\n" for message in messages)
        return self.encode_batch([f"{names}{turns}assistant: "], add_special_tokens=False)[0]

    def decode(self, token_ids: Sequence[TokenId], *, skip_special_tokens: bool) -> str:
        return b"".join(_bytes(token, skip_special_tokens) for token in token_ids).decode(errors="replace")

    def token_bytes(self, token_id: TokenId) -> bytes:
        return _bytes(token_id, skip_special_tokens=False)

    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> "ByteDecoder":
        return ByteDecoder(prompt, skip_special_tokens)


class ByteDecoder:
    """Holds back the bytes of an unfinished character; the prompt may have ended inside one."""

    def __init__(self, prompt: Sequence[TokenId], skip_special_tokens: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._skip = skip_special_tokens
        for token_id in prompt[-3:]:  # a character has at most three bytes before its last
            self.push(token_id)

    @property
    def num_held_bytes(self) -> int:
        return len(self._decoder.getstate()[0])

    def push(self, token_id: TokenId) -> str:
        return self._decoder.decode(_bytes(token_id, self._skip))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        return text if len(text) > 1 else ""  # half a character would be one U+FFFD


def _tokens(text: str, parse_special_tokens: bool) -> list[TokenId]:
    head, *parts = text.split("<eos>") if parse_special_tokens else [text]
    tokens = [TokenId(byte) for byte in head.encode()]
    for part in parts:
        tokens += [EOS, *(TokenId(byte) for byte in part.encode())]
    return tokens


def _bytes(token_id: TokenId, skip_special_tokens: bool) -> bytes:
    if token_id == EOS:
        return b"" if skip_special_tokens else b"<eos>"
    return bytes([token_id])
