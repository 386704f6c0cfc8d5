"""What an output may look like: formal grammars, and how far an output has come in one."""

from typing import Protocol

from ferrum_rt.interfaces.types import ResponseFormat, TokenId


class GrammarMatcher(Protocol):
    """One output on its way through a grammar. Used by one thread at a time."""

    def advance(self, token_id: TokenId) -> None:
        """The output goes on with this token. Raises RequestValidationError for one that the grammar does not allow, and
        when the grammar proves too complex."""
        ...

    def write_mask(self, mask: memoryview) -> None:
        """Say which tokens may come next: bit ``i % 8`` of byte ``i // 8`` of ``mask`` [at least vocabulary / 8 bytes,
        writable] is set for token i. Where the output may end, the end tokens' bits are set. Raises
        RequestValidationError when the grammar proves too complex."""
        ...


class Grammar(Protocol):
    """Compiled; shared by all requests that ask for the same."""

    def start(self) -> GrammarMatcher: ...


class GrammarCompiler(Protocol):
    """Compiles on whatever thread it is called, one call at a time, in bounded time and memory."""

    def compile(self, response_format: ResponseFormat) -> Grammar:
        """Raises RequestValidationError, naming response_format, for a definition that is wrong, too large or too
        complex."""
        ...
