"""A GrammarCompiler for the ByteTokenizer: the only output it allows is the definition itself."""

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from tests.fakes.executor import EOS, VOCAB_SIZE


class FakeGrammarCompiler:
    """Takes a regex or a grammar whose definition is one literal text; "too complex" fails. ``num_compiled`` counts."""

    def __init__(self) -> None:
        self.num_compiled = 0

    def compile(self, response_format: ResponseFormat) -> "FakeGrammar":
        definition = response_format.definition
        if response_format.type not in ("regex", "grammar") or not isinstance(definition, str):
            raise RequestValidationError(f"response_format: the fake takes no {response_format.type}")
        if definition == "too complex":
            raise RequestValidationError("response_format: the definition is too complex")
        self.num_compiled += 1
        return FakeGrammar(definition.encode())


class FakeGrammar:
    def __init__(self, text: bytes) -> None:
        self._tokens = [*map(TokenId, text), EOS]

    def start(self) -> "FakeGrammarMatcher":
        return FakeGrammarMatcher(self._tokens)


class FakeGrammarMatcher:
    def __init__(self, tokens: list[TokenId]) -> None:
        self._left = list(reversed(tokens))

    def advance(self, token_id: TokenId) -> None:
        if self._left == [EOS] or not self._left:  # over: the engine may feed what it likes
            self._left = []
        elif token_id != self._left.pop():
            raise RequestValidationError("response_format: the grammar does not allow this token here")

    def write_mask(self, mask: memoryview) -> None:
        assert mask.nbytes >= -(-VOCAB_SIZE // 8), "the mask is too short for the vocabulary"
        token_id = self._left[-1] if self._left else EOS
        mask[:] = bytes(1 << token_id % 8 if index == token_id // 8 else 0 for index in range(mask.nbytes))
