"""Token ids to text as they come, and where a stop string ends it."""

from codecs import utf_8_decode
from collections.abc import Sequence

from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.runtime.text.token_bytes import TokenBytes

# As much of the prompt as decides how its continuation is written, such as whether a word starts with a space.
_CONTEXT = 6
# A character has at most three bytes before its last, and a token has at least one.
_MAX_HELD = 3


def incremental_decoder(
    token_bytes: TokenBytes, prompt: Sequence[TokenId], *, skip_special_tokens: bool
) -> IncrementalTokenizer:
    """A decoder for one sequence. Its text is that of prompt and output together, after the prompt's whole characters."""
    kind = IncrementalDecoder if token_bytes.is_exact else WindowDecoder
    return kind(token_bytes, prompt, skip_special_tokens=skip_special_tokens)


class IncrementalDecoder:
    """Tokens to text through their bytes, of which it holds at most three: those of half a character. The prompt may have
    ended inside one. What is not UTF-8 becomes U+FFFD, as by Python's "replace"."""

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> None:
        self._token_bytes = token_bytes
        self._skipped = token_bytes.special_ids if skip_special_tokens else frozenset[int]()
        tail = b""
        for token_id in reversed(prompt):
            if token_id not in self._skipped:
                tail = token_bytes[token_id] + tail
            if len(tail) >= _MAX_HELD:
                break
        held = tail[utf_8_decode(tail, "replace")[1] :]
        self._held = held if _is_half_character(held) else b""
        self._is_start = token_bytes.drops_spaces and not tail

    @property
    def num_held_bytes(self) -> int:
        return len(self._held)

    def push(self, token_id: TokenId) -> str:
        """The text that is now certain. Takes less than a microsecond."""
        if token_id in self._skipped:
            return ""
        data = self._token_bytes[token_id]
        if self._is_start and data:
            self._is_start, data = False, self._token_bytes.at_start(token_id)
        if self._held:
            data = self._held + data
        text, length = utf_8_decode(data, "replace")
        self._held = data[length:]
        return text

    def flush(self) -> str:
        """Nothing, unless it holds what cannot become a character."""
        held, self._held = self._held, b""
        return "" if _is_half_character(held) else held.decode(errors="replace")


def _is_half_character(held: bytes) -> bool:
    """False for the start of a surrogate, which is none, but which Python's decoder holds back as well."""
    return len(held.decode(errors="replace")) == 1


class WindowDecoder:
    """Tokens to text for any other decoder: what the tokenizer makes of the last tokens and the new one, less what it makes
    of the last ones alone. Holds back at most three tokens, whose text may end inside a character."""

    def __init__(self, token_bytes: TokenBytes, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> None:
        self._token_bytes = token_bytes
        self._skipped = token_bytes.special_ids if skip_special_tokens else frozenset[int]()
        self._max_held = _MAX_HELD if token_bytes.has_half_characters else 0
        self._window = [token_id for token_id in prompt if token_id not in self._skipped][-_CONTEXT:]
        self._held = list[TokenId]()
        if self._max_held and self._decode(self._window).endswith("\ufffd"):
            self._window = []  # the prompt ends inside a character; else it would come out with that character's end

    @property
    def num_held_bytes(self) -> int:
        return sum(len(self._token_bytes[token_id]) for token_id in self._held)

    def push(self, token_id: TokenId) -> str:
        """The text that is now certain."""
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        piece = self._added()
        if len(self._held) <= self._max_held and piece.endswith("\ufffd"):
            return ""
        self._window = self._held if piece else (self._window + self._held)[-_CONTEXT:]
        self._held = []
        return piece

    def flush(self) -> str:
        """The whole characters among what was held back."""
        piece = self._added().rstrip("\ufffd")
        self._held = []
        return piece

    def _added(self) -> str:
        # By length: a byte that is no character's turns the bytes before it into as many U+FFFD, though they have gone out.
        return self._decode(self._window + self._held)[len(self._decode(self._window)) :]

    def _decode(self, token_ids: list[TokenId]) -> str:
        return self._token_bytes.rust.decode(token_ids, skip_special_tokens=False)


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces, and holds back what could be the start of one.
    Takes time in proportion to the text, whatever the strings."""

    def __init__(self, strings: Sequence[str], *, include: bool) -> None:
        self._matchers = [_Matcher(string) for string in strings]
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out now, and whether a stop string was found (then nothing goes out ever after)."""
        if not self._matchers:
            return text, False
        held, self._held = self._held, ""
        for end, character in enumerate(text, start=len(held) + 1):
            longest = 0
            for matcher in self._matchers:
                if matcher.feed(character):
                    longest = max(longest, matcher.num_matched)
            if longest:
                return (held + text)[: end if self._include else end - longest], True
        text = held + text
        cut = len(text) - max(matcher.num_matched for matcher in self._matchers)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """How much of one string the text so far ends with (Knuth, Morris, Pratt: Fast pattern matching in strings, 1977).
    ``_borders[n]`` is the longest proper start of the string's first n + 1 characters that they also end with; it is
    worked out as far as the text has come."""

    def __init__(self, string: str) -> None:
        self._string = string
        self._borders = [0]
        self.num_matched = 0

    def feed(self, character: str) -> bool:
        """Whether the text now ends with the whole string; then feed it nothing more."""
        self.num_matched = self._advance(self.num_matched, character)
        if self.num_matched > len(self._borders):
            self._borders.append(self._advance(self._borders[-1], character))
        return self.num_matched == len(self._string)

    def _advance(self, matched: int, character: str) -> int:
        while matched and self._string[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._string[matched] == character)
