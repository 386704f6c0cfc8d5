"""What a connection was asked and what it answered, held against docs/protocol.md."""

from collections import Counter, deque
from dataclasses import dataclass, field

from ferrum_rt.interfaces.types import ChatMessage, FinishReason, StreamChunk
from ferrum_rt.ipc.messages import (
    VERSION,
    Accepted,
    Cancel,
    Chunks,
    ClientMessage,
    Credit,
    EndSession,
    Failed,
    Finished,
    ForkSession,
    GoingAway,
    Goodbye,
    Hello,
    Query,
    Refused,
    Report,
    ServerMessage,
    Submit,
    Welcome,
    WireRequest,
)
from ferrum_rt.runtime.simulation.digests import expected_tokens
from tests.fakes.executor import EOS, ByteTokenizer

# What the protocol calls a few: an output's chunks that were under way when the credit ran out.
FEW = 8


def prompt_tokens(request: WireRequest) -> list[int]:
    """What the fake model is given for a request."""
    tokenizer = ByteTokenizer()
    if request.text is not None:
        texts = [request.text]
        return [
            *tokenizer.encode_batch(texts, add_special_tokens=True, parse_special_tokens=request.parse_special_tokens)[0]
        ]
    if request.token_ids is not None:
        packed = request.token_ids
        return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
    messages = [ChatMessage(role=message.role, content=message.content) for message in request.messages or ()]
    return [*tokenizer.encode_chat(messages)]


@dataclass(slots=True)
class Asked:
    """One request under way. ``is_right``: nothing but a cancellation or a lack of resources may fail it."""

    submit: Submit
    is_right: bool
    credit: int
    is_cancelled: bool = False
    is_accepted: bool = False
    num_chunks: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, FinishReason] = field(default_factory=dict)

    def add(self, chunk: StreamChunk) -> None:
        """Raises AssertionError for a chunk that may not come."""
        sampling = self.submit.request.sampling
        assert self.is_accepted, "a chunk came before accepted"
        assert 0 <= chunk.index < sampling.n, f"a chunk of output {chunk.index} of {sampling.n}"
        assert chunk.index not in self.reasons, f"a chunk came after the last of output {chunk.index}"
        self.num_chunks += 1
        allowed = self.credit + FEW * sampling.n
        assert self.num_chunks <= allowed, f"{self.num_chunks} chunks came for a credit of {self.credit}"
        self.tokens.setdefault(chunk.index, []).extend(chunk.token_ids)
        self.texts[chunk.index] = self.texts.get(chunk.index, "") + chunk.text
        if chunk.finish_reason is not None:
            self.reasons[chunk.index] = chunk.finish_reason

    def check_end(self, message: Finished | Failed, is_excused: bool) -> None:
        """Raises AssertionError where its outputs are not what the fake model says, or it should not have failed."""
        request = self.submit.request
        if self.tokens:
            prompt = prompt_tokens(request)
            for index, tokens in self.tokens.items():
                assert tokens == expected_tokens(prompt, len(tokens), sample=index), f"output {index} has other tokens"
                self._check_text(index, tokens)
        if isinstance(message, Finished):
            assert self.is_accepted, "finished came before accepted"
            assert set(self.reasons) == set(range(request.sampling.n)), f"finished, but only {self.reasons} have ended"
        elif self.is_right and not (self.is_cancelled or is_excused):
            assert message.code == "resource_exhausted", f"failed with {message.code}: {message.message}"

    def _check_text(self, index: int, tokens: list[int]) -> None:
        sampling, reason = self.submit.request.sampling, self.reasons.get(index)
        if reason is FinishReason.LENGTH and sampling.max_tokens is not None:
            assert len(tokens) == sampling.max_tokens, (
                f"output {index} ended at {len(tokens)} of {sampling.max_tokens} tokens"
            )
        if self.is_right:
            whole = bytes(token for token in tokens if token != EOS).decode()
            text = self.texts[index]
            assert whole.startswith(text), f"output {index} reads {text!r}, its tokens {whole!r}"
            if reason is FinishReason.LENGTH:
                assert text == whole, f"output {index} reads {text!r}, its tokens {whole!r}"


class Ledger:
    """Tell it what was said and what was heard; it raises AssertionError for what the protocol does not allow.
    ``is_ending``: the daemon must end the connection, for the client broke the protocol or left. ``report`` is the last."""

    def __init__(self) -> None:
        self.is_ending = False
        self.has_left = False
        self.is_cut = False
        self.is_welcome = False
        self.report = ""
        self.is_greeted = False
        self._may_be_cut = False
        self._asked: dict[str, deque[Asked]] = {}
        self._queries: Counter[int] = Counter()

    @property
    def waiting(self) -> list[str]:
        """The ids of requests that have no last message yet."""
        return [request_id for request_id, asked in self._asked.items() if asked]

    @property
    def num_queries(self) -> int:
        """Those that have no answer yet."""
        return self._queries.total()

    @property
    def waiting_right(self) -> list[str]:
        """Those of them that nothing hinders."""
        return [request_id for request_id in self.waiting if self._asked[request_id][0].is_right]

    @property
    def _is_excused(self) -> bool:
        """The daemon may end the connection, and with it whatever is under way."""
        return self.is_ending or self._may_be_cut

    def said(self, message: ClientMessage, *, is_right: bool = False) -> None:
        """In the order in which the daemon reads it."""
        if self.is_greeted is isinstance(message, Hello):
            self.broke()
        match message:
            case Hello():
                self.is_greeted = True
                self.is_ending |= message.version != VERSION
            case Submit():
                asked = self._asked.setdefault(message.request_id, deque())
                self._may_be_cut |= bool(asked)  # the one before may have ended, or not
                asked.append(Asked(message, is_right, message.credit))
            case Credit():
                for one in self._asked.get(message.request_id, ()):
                    one.credit += message.chunks
            case Cancel():
                for one in self._asked.get(message.request_id, ()):
                    one.is_cancelled = True
            case Query() | EndSession() | ForkSession():
                self._queries[message.query_id] += 1
            case Goodbye():
                self.left()

    def broke(self) -> None:
        """Something was said that is no message, or must not be said."""
        self.is_ending = True

    def left(self) -> None:
        """The client said goodbye, or hung up."""
        self.is_ending = self.has_left = True

    def heard(self, message: ServerMessage) -> None:
        """Raises AssertionError."""
        assert not self.is_cut, f"{message} came after the connection's last message"
        assert self.is_welcome or isinstance(message, Welcome | Failed), f"{message} came before welcome"
        match message:
            case Welcome():
                assert not self.is_welcome, "welcome came twice"
                assert message.version == VERSION
                self.is_welcome = True
            case Accepted():
                asked = self._first(message.request_id)
                assert not asked.is_accepted, "accepted came twice"
                asked.is_accepted = True
            case Chunks():
                for chunk in message.chunks:
                    self._first(chunk.request_id).add(chunk)
            case Finished():
                self._first(message.request_id).check_end(message, self._is_excused)
                self._asked[message.request_id].popleft()
            case Failed():
                self._failed(message)
            case Report():
                assert self._queries[message.query_id] > 0, f"report {message.query_id} answers no query"
                self._queries[message.query_id] -= 1
                self.report = message.content
            case Refused():
                assert self._queries[message.query_id] > 0, f"refusal {message.query_id} answers no query"
                self._queries[message.query_id] -= 1
            case GoingAway():
                pass

    def heard_end(self) -> None:
        """The daemon has closed. Raises AssertionError if it said no reason and the client did not leave."""
        assert self.is_cut or self.has_left or self._may_be_cut, "the connection was closed without a reason"

    def _failed(self, message: Failed) -> None:
        if message.request_id or self._asked.get(""):
            self._first(message.request_id).check_end(message, self._is_excused)
            self._asked[message.request_id].popleft()
            return
        assert self._is_excused or message.code == "resource_exhausted", (
            f"cut off for nothing: {message.code}: {message.message}"
        )
        self.is_cut = True

    def _first(self, request_id: str) -> Asked:
        asked = self._asked.get(request_id)
        assert asked, f"something came for {request_id!r}, which is not under way"
        return asked[0]
