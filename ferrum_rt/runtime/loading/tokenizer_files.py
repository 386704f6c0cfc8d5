"""A tokenizer from the files of a model's directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from ferrum_rt.interfaces.errors import TokenizerError
from ferrum_rt.interfaces.types import SpecialTokens, TokenId
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.text.chat_template import ChatTemplate
from ferrum_rt.runtime.text.tokenizer import HfTokenizer


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
