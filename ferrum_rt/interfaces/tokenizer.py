"""Text to tokens and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.types import ChatMessage, SpecialTokens, TokenId, Tool


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a tokenizer; ``vocab_size`` counts added tokens too, ``chat_template`` is the
    source of the model's."""

    vocab_size: int
    special_tokens: SpecialTokens
    chat_template: str | None


class IncrementalTokenizer(Protocol):
    """Turns one sequence's tokens into text as they come."""

    @property
    def num_held_bytes(self) -> int:
        """How many bytes of tokens (token_bytes) have not gone out as text, which begin the next character."""
        ...

    def push(self, token_id: TokenId) -> str:
        """The text that is now certain: never half a character, possibly empty."""
        ...

    def flush(self) -> str:
        """At the end of the sequence: the whole characters among what was held back."""
        ...


class Tokenizer(Protocol):
    """Thread-safe. Raises TokenizerError for what cannot be encoded."""

    info: TokenizerInfo

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool, parse_special_tokens: bool = False
    ) -> list[list[TokenId]]:
        """Token ids of each text. The names of special tokens in it are text like any other, unless they are to be
        parsed; ``add_special_tokens`` puts the tokenizer's own (such as BOS) around it."""
        ...

    def encode_chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[TokenId]:
        """Token ids of a conversation, ending where the assistant is to go on. The special tokens of the model's chat
        template are parsed, those in the messages' contents are text. Raises RequestValidationError where the template
        refuses or fails."""
        ...

    def decode(self, token_ids: Sequence[TokenId], *, skip_special_tokens: bool) -> str: ...
    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> IncrementalTokenizer: ...

    def token_bytes(self, token_id: TokenId) -> bytes:
        """What a token adds to a text, in UTF-8 (half a character possibly); a special token's name."""
        ...


class TokenizerFactory(Protocol):
    """Loads the tokenizer that lies in a model's directory."""

    def load(self, directory: Path) -> Tokenizer: ...
