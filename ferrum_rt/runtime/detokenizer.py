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
    """Finds the first of several strings in a text that comes in pieces, and holds back what could be the start of one."""

    def __init__(self, strings: Sequence[str], *, include: bool) -> None:
        self._strings = tuple(strings)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may go out now, and whether a stop string was found (then nothing goes out ever after)."""
        if not self._strings:
            return text, False
        text = self._held + text
        found = [(at, len(string)) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            at, length = min(found, key=lambda match: (match[0] + match[1], match[0]))
            self._held = ""
            return text[: at + length if self._include else at], True
        keep = max(self._overlap(text, string) for string in self._strings)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """The longest end of ``text`` that ``string`` starts with."""
        for length in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:length]):
                return length
        return 0
