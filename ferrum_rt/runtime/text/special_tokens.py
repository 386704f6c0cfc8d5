"""Special tokens are tokens where a chat template writes them, and text like any other where a caller does."""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import Model

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.types import TokenId

# Noncharacters are for use inside a program. A stand-in is the first of these with a number, written as a character of
# private use: it takes the place of a name in what the caller wrote. An alias is the second with a number: it takes the
# place of a special token in what the template wrote.
_STAND_IN, _ALIAS = "\ufdd0", "\ufdd1"
_FIRST_NUMBER = 0xF0000


class PromptEncoder:
    """A tokenizer, with copies of it that share its vocabulary: one that takes special tokens for text, and one that
    takes them for text but knows them under aliases. Thread-safe. What ``tokenizers`` raises comes out as it is."""

    def __init__(self, rust: RustTokenizer) -> None:
        added = rust.get_added_tokens_decoder()
        special = {token.content: (id, token) for id, token in added.items() if token.special}
        hidden = _names_in_model(rust, special)
        model = _model_without(rust, hidden) if hidden else rust.model
        self._rust, self._plain, self._chat = rust, _copy(rust, model, hidden), _copy(rust, model, hidden)
        self._aliases, self._ids_of_aliases = _add_aliases(self._chat, rust, special)
        self._special_ids = frozenset(id for id, _ in special.values())
        self._has_normalized = any(token.normalized for _, token in special.values())
        self._replaced = [*special, _STAND_IN]
        self._stand_ins = {name: _STAND_IN + chr(_FIRST_NUMBER + number) for number, name in enumerate(self._replaced)}
        # The names of other added tokens are matched too: one of them can begin with the name of a special token.
        names = _pattern({token.content for token in added.values()} | {_STAND_IN})
        numbers = f"[{chr(_FIRST_NUMBER)}-{chr(_FIRST_NUMBER + len(special))}]"
        self._to_protect, self._names = re.compile(_pattern(self._replaced)), re.compile(names)
        self._names_and_stand_ins = re.compile(f"{_STAND_IN}({numbers})|{names}")

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool, parse: bool) -> list[list[TokenId]]:
        """Token ids of each text, in which the names of special tokens are parsed or are text."""
        return _encode(self._rust if parse else self._plain, texts, add_special_tokens=add_special_tokens)

    def protect(self, text: str) -> str:
        """A caller's text for a chat template, with stand-ins for the names of special tokens."""
        if self._to_protect.search(text) is None:
            return text
        return self._names.sub(lambda match: self._stand_ins.get(match[0], match[0]), text)

    def encode_rendered(self, text: str) -> list[TokenId]:
        """Token ids of what a template made of protected texts."""
        if _STAND_IN not in text:
            [ids] = _encode(self._rust, [text], add_special_tokens=False)
            if not self._has_normalized or self._num_special(ids) <= self._num_named(text):
                return ids  # the same tokens as in any other program
            # Else the normalizer made a name of something that only looked like it.
        if _ALIAS in text:
            raise RequestValidationError("prompt: U+FDD1 is not a character; leave it out of the messages")
        aliased = self._names_and_stand_ins.sub(self._resolve, text)
        [ids] = _encode(self._chat, [aliased], add_special_tokens=False)
        return [self._ids_of_aliases.get(id, id) for id in ids]

    def _resolve(self, match: re.Match[str]) -> str:
        if match[1]:
            return self._replaced[ord(match[1]) - _FIRST_NUMBER]
        return self._aliases.get(match[0], match[0])

    def _num_special(self, ids: list[TokenId]) -> int:
        return sum(id in self._special_ids for id in ids)

    def _num_named(self, text: str) -> int:
        return sum(name in self._aliases for name in self._names.findall(text))


def _encode(rust: RustTokenizer, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[TokenId]]:
    encodings = rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [cast(list[TokenId], encoding.ids) for encoding in encodings]


def _copy(rust: RustTokenizer, model: Model, hidden: Mapping[str, str]) -> RustTokenizer:
    """A tokenizer with the same token ids, to which special tokens are text. It takes milliseconds: the vocabulary is
    shared."""
    copy = RustTokenizer(model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(rust, part) is not None:
            setattr(copy, part, getattr(rust, part))
    added = [token for _, token in sorted(rust.get_added_tokens_decoder().items())]  # in order, as ids follow from it
    copy.add_tokens([AddedToken(hidden[token.content]) if token.content in hidden else token for token in added])
    copy.encode_special_tokens = True
    return copy


def _add_aliases(
    copy: RustTokenizer, rust: RustTokenizer, special: Mapping[str, tuple[int, AddedToken]]
) -> tuple[dict[str, str], dict[int, TokenId]]:
    """Makes ``copy`` know each special token by an alias. Returns the aliases by name, and the tokens' ids by those of
    their aliases, none of which is a token's."""
    aliases, ids = dict[str, str](), dict[int, TokenId]()
    number, waiting = _FIRST_NUMBER, list(special)
    while waiting:
        tried = {name: _ALIAS + chr(number + index) for index, name in enumerate(waiting)}
        number += len(tried)
        tokens = [special[name][1] for name in waiting]
        copy.add_tokens(
            [
                AddedToken(tried[token.content], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
                for token in tokens
            ]
        )
        for name, alias in tried.items():
            found = copy.token_to_id(alias)
            # A vocabulary with gaps has ids beyond its size, and new tokens are numbered from its size on.
            if found is not None and rust.id_to_token(found) is None:
                aliases[name] = alias
                ids[found] = TokenId(special[name][0])
        waiting = [name for name in waiting if name not in aliases]
    return aliases, ids


def _names_in_model(rust: RustTokenizer, special: Mapping[str, tuple[int, AddedToken]]) -> dict[str, str]:
    """What to call the special tokens that the model itself would make of their names (Unigram and WordLevel models do),
    by name: something that nobody can guess. Unknown words need theirs, and one that is a single character is that
    character's token."""
    model = rust.model
    candidates = {id: name for name, (id, _) in special.items() if len(name) > 1 and model.token_to_id(name) == id}
    return {
        name: secrets.token_hex(16)
        for id, name in candidates.items()
        if name != getattr(model, "unk_token", None) and any(token.id == id for token in model.tokenize(name))
    }


def _model_without(rust: RustTokenizer, hidden: Mapping[str, str]) -> Model:
    """The tokenizer's model with some tokens under other names. It takes as long as loading it did."""
    state: dict[str, Any] = json.loads(rust.to_str()) | {"added_tokens": [], "post_processor": None}
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of a name and a score
        model["vocab"] = [[hidden.get(name, name), score] for name, score in vocabulary]
    else:
        model["vocab"] = {hidden.get(name, name): id for name, id in vocabulary.items()}
    if "merges" in model:
        model["merges"] = [
            [left, right] for left, right in model["merges"] if hidden.keys().isdisjoint((left, right, left + right))
        ]
    renamed: Model = RustTokenizer.from_str(json.dumps(state)).model
    return renamed


def _pattern(names: Iterable[str]) -> str:
    """A regular expression for the longest of the names, as a tree: its time does not depend on how many there are."""
    tails = dict[str, list[str]]()
    for name in names:
        tails.setdefault(name[:1], []).append(name)
    is_optional = tails.pop("", None) is not None
    if not tails:
        return ""
    branches = []
    for group in tails.values():
        low, high = min(group), max(group)
        length = next((index for index, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        rest = _pattern([name[length:] for name in group]) if len(group) > 1 else ""
        branches.append(re.escape(low[:length]) + rest)
    return f"(?:{'|'.join(branches)}){'?' if is_optional else ''}"
