"""Token ids to text as they come, and where a stop string ends it."""

from collections.abc import Sequence

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import DecodeStream

from ferrum_rt.interfaces.errors import TokenizerError
from ferrum_rt.interfaces.types import TokenId

# As much of the prompt as decides how its continuation is written, such as whether a word starts with a space.
_CONTEXT = 6


class IncrementalDecoder:
    """One sequence's DecodeStream, primed with the end of the prompt. Never emits half a character."""

    def __init__(self, rust: RustTokenizer, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> None:
        context = list(prompt[-_CONTEXT:])
        if rust.decode(context, skip_special_tokens=skip_special_tokens).endswith("\ufffd"):
            context = []  # the prompt ends inside a character; the stream would give out the context with its end
        self._rust = rust
        self._stream = DecodeStream(context, skip_special_tokens)

    def push(self, token_id: TokenId) -> str:
        try:
            return self._stream.step(self._rust, token_id) or ""
        except Exception as error:  # the Rust side raises plain Exception
            raise TokenizerError(f"the output cannot be turned into text: {error}") from error


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
