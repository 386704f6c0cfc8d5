"""Hugging Face tokenizers behind the Tokenizer contract."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as RustTokenizer

from ferrum_rt.interfaces.errors import RequestValidationError, TokenizerError
from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer, TokenizerInfo
from ferrum_rt.interfaces.types import ChatMessage, SpecialTokens, TokenId
from ferrum_rt.runtime.chat_template import ChatTemplate
from ferrum_rt.runtime.detokenizer import IncrementalDecoder


class HfTokenizer:
    """A tokenizer.json, and the chat template that came with it. Thread-safe."""

    def __init__(self, rust: RustTokenizer, special_tokens: SpecialTokens, template: ChatTemplate | None) -> None:
        self._rust, self._template = rust, template
        self.info = TokenizerInfo(
            vocab_size=rust.get_vocab_size(with_added_tokens=True),
            special_tokens=special_tokens,
            has_chat_template=template is not None,
        )

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[TokenId]]:
        """Token ids of each text. Call it off the event loop: it releases the GIL."""
        try:
            encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except Exception as error:  # the Rust side raises plain Exception, and a TypeError for lone surrogates
            raise TokenizerError(f"the text cannot be tokenized: {_unicode_fault(texts) or error}") from error
        return [cast(list[TokenId], encoding.ids) for encoding in encodings]

    def decode(self, token_ids: Sequence[TokenId], *, skip_special_tokens: bool) -> str:
        return self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[ChatMessage]) -> str:
        if self._template is None:
            raise RequestValidationError("prompt: this model has no chat template; send text or token ids")
        return self._template.render(messages)

    def incremental(self, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> IncrementalTokenizer:
        return IncrementalDecoder(self._rust, prompt, skip_special_tokens=skip_special_tokens)


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
        config = _read_config(directory / "tokenizer_config.json")
        names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        present = {key: token for key, token in names.items() if token is not None}
        ids = {key: TokenId(found) for key, token in present.items() if (found := rust.token_to_id(token)) is not None}
        eos = self._eos or tuple(ids[key] for key in ("eos_token",) if key in ids)
        special = SpecialTokens(bos=ids.get("bos_token"), eos=eos, pad=ids.get("pad_token"))
        return HfTokenizer(rust, special, _read_template(directory, config, present))


def _unicode_fault(texts: Sequence[str]) -> str | None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"it is not valid Unicode: {error.reason} at position {error.start}"
    return None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: expected a JSON object")
    return config


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
