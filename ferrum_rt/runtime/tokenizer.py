"""Hugging Face tokenizers behind the Tokenizer contract."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from ferrum_rt.interfaces.errors import FerrumError, RequestValidationError, TokenizerError, without_words
from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer, TokenizerInfo
from ferrum_rt.interfaces.types import ChatMessage, SpecialTokens, TokenId, Tool
from ferrum_rt.runtime.chat_template import ChatTemplate
from ferrum_rt.runtime.detokenizer import incremental_decoder
from ferrum_rt.runtime.json_file import read_json
from ferrum_rt.runtime.special_tokens import PromptEncoder
from ferrum_rt.runtime.token_bytes import TokenBytes


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


class HfTokenizerFactory:
    """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where they are."""

    def __init__(self, eos: tuple[TokenId, ...] = ()) -> None:
        self._eos = eos

    def load(self, directory: Path) -> HfTokenizer:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path}: no such file")
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise TokenizerError(f"{path}: not a valid tokenizer: {error}") from error
        rust.no_truncation()  # some files say to cut texts, or to fill them up to one length
        rust.no_padding()
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path, TokenizerError) if config_path.is_file() else {}
        names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        present = {key: token for key, token in names.items() if token is not None}
        ids = {key: TokenId(found) for key, token in present.items() if (found := rust.token_to_id(token)) is not None}
        eos = self._eos or tuple(ids[key] for key in ("eos_token",) if key in ids)
        special = SpecialTokens(bos=ids.get("bos_token"), eos=eos, pad=ids.get("pad_token"))
        return HfTokenizer(rust, special, _read_template(directory, config, present))


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


def _content(token: Any) -> str | None:
    """A special token is written as its text, or as an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_template(directory: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot be read: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}.get("default")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, special, str(directory / "tokenizer_config.json"))
