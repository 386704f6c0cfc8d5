"""Text to tokens and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from ferrum_rt.interfaces.types import ChatMessage, SpecialTokens, TokenId


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a tokenizer; ``vocab_size`` counts added tokens too."""

    vocab_size: int
    special_tokens: SpecialTokens
    has_chat_template: bool


class IncrementalTokenizer(Protocol):
    """Turns one sequence's tokens into text as they come."""

    def push(self, token_id: TokenId) -> str:
        """The text that is now certain: never half a character, possibly empty."""
        ...


class Tokenizer(Protocol):
    """Thread-safe. Raises TokenizerError for what cannot be encoded."""

    info: TokenizerInfo

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[TokenId]]: ...
    def decode(self, token_ids: Sequence[TokenId], *, skip_special_tokens: bool) -> str: ...
    def render_chat(self, messages: Sequence[ChatMessage]) -> str: ...
    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> IncrementalTokenizer: ...


class TokenizerFactory(Protocol):
    """Loads the tokenizer that lies in a model's directory."""

    def load(self, directory: Path) -> Tokenizer: ...
