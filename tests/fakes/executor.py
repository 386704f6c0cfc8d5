"""A ModelExecutor without a model, and a tokenizer of bytes.

The fake's K/V cache holds, for each position, a digest of the tokens up to there, in the page that the block table names.
The next token follows from the digest alone. So a request's output depends on nothing but its own tokens as long as the
scheduler hands out slots, positions and pages rightly; where it does not, the fake raises AssertionError, or the output
differs from ``expected_tokens``.
"""

import codecs
import mmap
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import BackendError, TokenizerError
from ferrum_rt.interfaces.model_executor import DecodeOutput, PrefillOutput, StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SampledToken
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
from ferrum_rt.runtime.loader import LoadedModel
from ferrum_rt.runtime.worker import finished

EOS = TokenId(256)
VOCAB_SIZE = 257
MAX_MODEL_LEN = 1024

Answer = Callable[[int], TokenId]
"""The token that follows a text with this digest."""


def printable(digest: int) -> TokenId:
    """An Answer: one of the 95 printable ASCII characters, so never the end of the text."""
    return TokenId(32 + digest % 95)


def expected_tokens(prompt: Sequence[int], count: int, answer: Answer = printable, sample: int = 0) -> list[TokenId]:
    """What a FakeExecutor with this ``answer`` generates after ``prompt`` as the request's sample number ``sample``."""
    digest, tokens = 0, list[TokenId]()
    for token in prompt:
        digest = _digest(digest, token)
    for _ in range(count):
        tokens.append(answer(_digest(digest, sample) if sample else digest))
        digest = _digest(digest, tokens[-1])
    return tokens


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


@dataclass(slots=True)
class _Slot:
    """``length`` is None until the first chunk says how much came from the prefix cache. ``heads`` are what the first
    entry of each page held when this sequence wrote or took it over: whoever takes the page writes that entry first."""

    request_id: RequestId
    pages: list[int]
    sample_index: int
    length: int | None = None
    last_token: TokenId | None = None
    heads: list[int] = field(default_factory=list)


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
    ) -> None:
        self.num_slots = config.scheduler.max_running_requests
        self.num_steps = 0
        self.is_closed = False
        self.step_s = step_s
        self.fail_at = fail_at or set()
        self.nan_requests = nan_requests or set()
        self._answer, self._on_step = answer, on_step
        self._clock = None if clock is None else mapped_clock(clock)
        self._block_size = config.kv_cache.block_size
        wanted_len = config.model.max_model_len or MAX_MODEL_LEN
        self.num_pages = config.kv_cache.num_pages or self.num_slots * -(-wanted_len // self._block_size)
        self._digests: list[int | None] = [None] * (self.num_pages * self._block_size)
        self._slots: dict[int, _Slot] = {}
        self.model_info = ModelInfo(
            id=ModelId("fake"),
            type=ModelType.LLAMA,
            num_parameters=0,
            num_layers=0,
            hidden_size=0,
            vocab_size=VOCAB_SIZE,
            max_model_len=min(wanted_len, self.num_pages * self._block_size),
            dtype=DataType.FLOAT32,
            device=Device.CPU,
        )

    def execute(self, step: StepInput) -> Future[StepOutput]:
        self.num_steps += 1
        number = self.num_steps
        if self._on_step is not None:
            self._on_step(number, step)
        for assigned in step.assigned:
            assert 0 <= assigned.slot < self.num_slots, f"slot {assigned.slot} is out of range"
            index = assigned.sampling.sample_index
            self._slots[assigned.slot] = _Slot(assigned.request_id, list(assigned.pages), index)
        for appended in step.appended:
            pages = self._slots[appended.slot].pages
            assert appended.index == len(pages), f"page {appended.index} of slot {appended.slot} follows {len(pages)} pages"
            pages.append(appended.page)
        for copied in step.copied:
            size = self._block_size
            source = slice(copied.source * size, (copied.source + 1) * size)
            self._digests[copied.target * size : (copied.target + 1) * size] = self._digests[source]
        used = [item.slot for item in step.batch.decodes] + [item.slot for item in step.batch.prefills]
        assert len(set(used)) == len(used), "a slot is in the batch twice"
        decodes = [DecodeOutput(self._decode(item.slot, item.position)) for item in step.batch.decodes]
        prefills = [
            PrefillOutput(self._prefill(item.slot, item.token_ids, item.start, sample=item.sample))
            for item in step.batch.prefills
        ]
        if self.step_s:
            time.sleep(self.step_s)
        if self._clock is not None:
            self._clock[0] = time.perf_counter()
        # Last, so that the step that is already planned behind this one finds its slots where it expects them.
        if number in self.fail_at:
            raise RuntimeError(f"step {number} was told to fail")
        return finished(StepOutput(decodes, prefills))

    def close(self) -> None:
        self.is_closed = True
        if self._clock is not None:
            self._clock.release()

    def memory_usage(self) -> MemoryUsage:
        return MemoryUsage(weights=0, kv_cache=0)

    def _decode(self, number: int, position: int) -> SampledToken:
        slot = self._slots[number]
        assert slot.length == position, f"slot {number} holds {slot.length} tokens, and decodes at {position}"
        return self._sample(slot, self._write(slot, [slot.last_token or TokenId(0)], position))

    def _prefill(self, number: int, token_ids: list[TokenId], start: int, *, sample: bool) -> SampledToken | None:
        slot = self._slots[number]
        if slot.length is None:
            self._take_over_prefix(slot, start)
        assert token_ids, f"slot {number} prefills no tokens"
        assert slot.length == start, f"slot {number} holds {slot.length} tokens, and prefills from {start}"
        digest = self._write(slot, token_ids, start)
        return self._sample(slot, digest) if sample else None

    def _take_over_prefix(self, slot: _Slot, length: int) -> None:
        size = self._block_size
        for start in range(0, length, size):
            page = slot.pages[start // size]
            entries = self._digests[page * size : page * size + min(size, length - start)]
            known = [entry for entry in entries if entry is not None]
            assert len(known) == len(entries), f"page {page} came from others, but does not hold what they computed"
            slot.heads.append(known[0])
        slot.length = length

    def _write(self, slot: _Slot, token_ids: list[TokenId], start: int) -> int:
        """The digest of all tokens of the slot, once these stand at ``start`` and after."""
        size, pages, digests = self._block_size, slot.pages, self._digests
        assert start + len(token_ids) <= len(pages) * size, f"{slot.request_id} has no page for its tokens"
        for page, head in zip(pages, slot.heads, strict=False):
            assert digests[page * size] == head, f"page {page} of {slot.request_id} was overwritten by another"
        before = digests[pages[(start - 1) // size] * size + (start - 1) % size] if start else 0
        assert before is not None, f"{slot.request_id} reads a position that was never written"
        digest = before
        for position, token_id in enumerate(token_ids, start):
            digest = _digest(digest, token_id)
            digests[pages[position // size] * size + position % size] = digest
            if position % size == 0:
                slot.heads.append(digest)
        slot.length = start + len(token_ids)
        return digest

    def _sample(self, slot: _Slot, digest: int) -> SampledToken:
        if slot.request_id in self.nan_requests:
            slot.last_token = None
            return SampledToken(None, error=BackendError("the model's logits are not numbers (NaN) for this request"))
        slot.last_token = self._answer(digest if slot.sample_index == 0 else _digest(digest, slot.sample_index))
        return SampledToken(slot.last_token)


class ByteTokenizer:
    """Token i is the byte i; EOS ends a text, and reads "<eos>" where special tokens are not skipped."""

    info = TokenizerInfo(vocab_size=VOCAB_SIZE, special_tokens=SpecialTokens(eos=(EOS,)), chat_template="fake")

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool, parse_special_tokens: bool = False
    ) -> list[list[TokenId]]:
        try:
            return [_tokens(text, parse_special_tokens) for text in texts]
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text cannot be tokenized: {error}") from error

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


def _digest(before: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), before)
