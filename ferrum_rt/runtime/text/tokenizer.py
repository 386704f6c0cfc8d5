"""Hugging Face tokenizers behind the Tokenizer contract."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer as RustTokenizer

from ferrum_rt.interfaces.errors import FerrumError, RequestValidationError, TokenizerError, without_words
from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer, TokenizerInfo
from ferrum_rt.interfaces.types import ChatMessage, SpecialTokens, TokenId, Tool
from ferrum_rt.runtime.text.chat_template import ChatTemplate
from ferrum_rt.runtime.text.detokenizer import incremental_decoder
from ferrum_rt.runtime.text.special_tokens import PromptEncoder
from ferrum_rt.runtime.text.token_bytes import TokenBytes


class HfTokenizer:
    """A tokenizer.json, and the chat template that came with it. Thread-safe."""

    def __init__(self, rust: RustTokenizer, special_tokens: SpecialTokens, template: ChatTemplate | None) -> None:
        self._rust, self._template = rust, template
        self._encoder, self._token_bytes = PromptEncoder(rust), TokenBytes(rust)
        self.info = TokenizerInfo(
            vocab_size=rust.get_vocab_size(with_added_tokens=True),
            special_tokens=special_tokens,
            chat_template=None if template is None else template.source,
        )

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool, parse_special_tokens: bool = False
    ) -> list[list[TokenId]]:
        """Token ids of each text. Call it off the event loop: it releases the GIL."""
        with _tokenizer_errors(texts):
            return self._encoder.encode_batch(texts, add_special_tokens=add_special_tokens, parse=parse_special_tokens)

    def encode_chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[TokenId]:
        """Token ids of a conversation; no message can bring a special token in. Call it off the event loop."""
        if self._template is None:
            raise RequestValidationError("prompt: this model has no chat template; send text or token ids")
        rendered = self._template.render(messages, tools, self._encoder.protect)
        with _tokenizer_errors([rendered]):
            return self._encoder.encode_rendered(rendered)

    def decode(self, token_ids: Sequence[TokenId], *, skip_special_tokens: bool) -> str:
        return self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: TokenId) -> bytes:
        """What a token adds to a text; nothing where there is no such token. From the second call on it is looked up."""
        return self._token_bytes[token_id]

    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> IncrementalTokenizer:
        return incremental_decoder(self._token_bytes, prompt, skip_special_tokens=skip_special_tokens)


@contextmanager
def _tokenizer_errors(texts: Sequence[str]) -> Iterator[None]:
    """Makes a TokenizerError of what the Rust side raises over ``texts``."""
    try:
        yield
    except FerrumError:
        raise
    except Exception as error:  # it raises plain Exception, and a TypeError for lone surrogates
        if fault := _unicode_fault(texts):
            raise TokenizerError(f"the text cannot be tokenized: {fault}") from None
        raise without_words(TokenizerError, "the text cannot be tokenized", error) from None


def _unicode_fault(texts: Sequence[str]) -> str | None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"it is not valid Unicode: {error.reason} at position {error.start}"
    return None
