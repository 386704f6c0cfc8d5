"""The bytes that each token adds to a text."""

import json
import re
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

# A byte-level vocabulary writes a byte as a printable character: itself, or for one that is not printable the next from
# U+0100 on (``bytes_to_unicode`` in GPT-2).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + index): byte for index, byte in enumerate(_OTHERS)}

_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
# Decoders whose steps take one token at a time, but for the spaces that a text begins with.
_ORDER = re.compile("ByteLevel |(?:Replace |Metaspace |ByteFallback )*(?:Fuse (?:Strip )?)?")


class TokenBytes(dict[int, bytes]):
    """Bytes by token id, filled as they are asked for; empty for an id that is no token's. Thread-safe.

    ``is_exact`` says that the bytes of several tokens, one after the other, are the bytes of their text, but for the spaces
    that a text may lose at its start (``drops_spaces``). Decoders that are not made of ByteLevel, or of ByteFallback,
    Replace and Metaspace, look at a token's neighbours; with them its bytes are what it adds after itself.
    """

    def __init__(self, rust: RustTokenizer) -> None:
        super().__init__()
        self.rust = rust
        self.special_ids = frozenset(id for id, token in rust.get_added_tokens_decoder().items() if token.special)
        steps = _read_steps(rust)
        kinds = [f"{step['type']} " for step in steps]
        self._is_byte_level, self._has_byte_fallback = "ByteLevel " in kinds, "ByteFallback " in kinds
        self.has_half_characters = self._is_byte_level or self._has_byte_fallback
        self.is_exact = bool(steps) and _ORDER.fullmatch("".join(kinds)) is not None and all(map(_is_simple, steps))
        self._replacements = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
        self._is_stripped = "Strip " in kinds
        self.drops_spaces = self._is_stripped or any(new != first for _, new, first in self._replacements)

    def __missing__(self, token_id: int) -> bytes:
        token = self.rust.id_to_token(token_id)
        if token is None:
            return b""  # and not kept: there is no end of such ids
        self[token_id] = data = self._of(token) if self.is_exact else self._after_itself(token_id)
        return data

    def at_start(self, token_id: int) -> bytes:
        """The same for the first token of a text."""
        token = self.rust.id_to_token(token_id)
        if token is None:
            return b""
        data = self._of(token, is_first=True)
        return data.removeprefix(b" ") if self._is_stripped else data

    def _of(self, token: str, *, is_first: bool = False) -> bytes:
        if self._is_byte_level:
            try:
                return bytes(map(_BYTES.__getitem__, token))
            except KeyError:  # a character that stands for no byte: an added token, which is not written in bytes
                return token.encode()
        if self._has_byte_fallback and (match := _FALLBACK.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new, first in self._replacements:
            token = token.replace(old, first if is_first else new)
        return token.encode()

    def _after_itself(self, token_id: int) -> bytes:
        once, twice = (self.rust.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        return twice[len(once) :].encode()


def _read_steps(rust: RustTokenizer) -> list[dict[str, Any]]:
    """The decoder's steps, as tokenizer.json has them."""
    if rust.decoder is None:
        return []
    decoder = json.loads(rust.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _is_simple(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "Replace":
            return "String" in step["pattern"]  # not a regular expression
        case "Strip":
            return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
    return True


def _replacement(step: dict[str, Any]) -> tuple[str, str, str]:
    """What a step replaces, and by what: in any token, and in a text's first."""
    if step["type"] == "Replace":
        return step["pattern"].get("String", ""), step["content"], step["content"]
    return step["replacement"], " ", " " if step["prepend_scheme"] == "never" else ""
