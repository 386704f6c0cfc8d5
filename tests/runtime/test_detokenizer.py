"""Tokens to text as they come, and stop strings in a text that comes in pieces."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from ferrum_rt.interfaces.requests import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.runtime.detokenizer import IncrementalDecoder, StopStrings
from ferrum_rt.runtime.tokenizer import HfTokenizerFactory
from tests.checkpoints import BOS, EOS, IM_END, IM_START, VOCAB_SIZE, save_tokenizer

REPLACEMENT = "\ufffd"

# Any text that UTF-8 can write, but for U+FFFD: where that is, half a character cannot be told from a whole one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=60)
# Of many bytes each, so that tokens end inside characters; joined ones; and white space.
HARD_TEXTS = st.text(st.sampled_from("aé你🙂👩‍🦰\u0301ﷺ \n\t"), max_size=40)
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40)


@pytest.fixture(scope="module")
def rust(tmp_path_factory: pytest.TempPathFactory) -> RustTokenizer:
    """A byte-level BPE, as Llama 3, Qwen and most newer models have."""
    return RustTokenizer.from_file(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"))


@pytest.fixture(scope="module")
def pieces() -> RustTokenizer:
    """A tokenizer of the older kind, as in Llama 2 and Gemma: words start with "▁", and what is not in the vocabulary is
    written as bytes. A text's first space is dropped."""
    words = ["<unk>", "▁the", "▁fox", "▁", "jump", "s", "▁naïve", "▁你好", "é"]
    vocabulary = {token: index for index, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def ids_of(rust: RustTokenizer, text: str) -> list[TokenId]:
    return [TokenId(token) for token in rust.encode(text, add_special_tokens=False).ids]


def id_of(rust: RustTokenizer, token: str) -> TokenId:
    found = rust.token_to_id(token)
    assert found is not None
    return TokenId(found)


def push_all(
    rust: RustTokenizer, prompt: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True
) -> list[str]:
    """What each token adds to the text, after ``prompt``."""
    decoder = IncrementalDecoder(rust, [TokenId(token) for token in prompt], skip_special_tokens=skip_special_tokens)
    return [decoder.push(TokenId(token)) for token in tokens]


@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS | HARD_TEXTS, text=TEXTS | HARD_TEXTS)
def test_pieces_are_the_text(rust: RustTokenizer, prompt: str, text: str) -> None:
    """The pieces of a text, after any prompt, are the text, and none of them has half a character."""
    emitted = push_all(rust, ids_of(rust, prompt), ids_of(rust, text))
    assert "".join(emitted) == text
    assert not any(REPLACEMENT in piece for piece in emitted)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS | HARD_TEXTS)
def test_text_goes_out_as_soon_as_it_is_certain(rust: RustTokenizer, text: str) -> None:
    """Whenever the tokens so far end with a whole character, all of their text has gone out."""
    tokens = ids_of(rust, text)
    emitted = ""
    for count, piece in enumerate(push_all(rust, [], tokens), start=1):
        emitted += piece
        whole = rust.decode(tokens[:count])
        assert whole.startswith(emitted)
        assert emitted == whole or whole.endswith(REPLACEMENT)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(prompt=TOKENS, tokens=TOKENS, skip=st.booleans())
@example(prompt=[], tokens=[BOS, 0x2C, EOS, IM_START], skip=False)
def test_pieces_of_any_tokens(rust: RustTokenizer, prompt: list[int], tokens: list[int], skip: bool) -> None:
    """Whatever tokens a model comes up with, after whatever prompt, the pieces are what decode() makes of the tokens that
    were generated, but for half a character at the end, which is still held back."""
    if rust.decode(prompt, skip_special_tokens=skip).endswith(REPLACEMENT):
        prompt = []  # see test_prompt_that_ends_inside_a_character
    emitted = "".join(push_all(rust, prompt, tokens, skip_special_tokens=skip))
    whole = rust.decode(tokens, skip_special_tokens=skip)
    assert whole.startswith(emitted)
    assert emitted == whole or whole.endswith(REPLACEMENT)


def byte_ids(rust: RustTokenizer, text: str) -> list[TokenId]:
    """One token per byte, with no merges. A byte-level BPE writes a byte as a printable character: itself, or for one that
    is not printable the next from U+0100 on (``bytes_to_unicode`` in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    written = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return [id_of(rust, written[byte]) for byte in text.encode()]


@settings(max_examples=200, deadline=None)
@given(before=TEXTS, after=TEXTS | HARD_TEXTS, inside=st.sampled_from("é你🙂"), cut=st.integers(1, 3))
def test_prompt_that_ends_inside_a_character(rust: RustTokenizer, before: str, after: str, inside: str, cut: int) -> None:
    """After a prompt that ends inside a character, the text that follows is whole, and nothing of the prompt comes again."""
    head = ids_of(rust, before)
    tail = byte_ids(rust, inside)
    cut = min(cut, len(tail) - 1)
    emitted = "".join(push_all(rust, head + tail[:cut], tail[cut:] + ids_of(rust, after)))
    # The end of the character alone is no text; it is shown as what decode() shows for it, or not at all.
    assert emitted.lstrip(REPLACEMENT) == after
    assert emitted.count(REPLACEMENT) <= len(tail) - cut


def test_special_tokens_are_skipped_or_written(rust: RustTokenizer) -> None:
    """Special tokens add nothing when they are skipped, and their text when they are not."""
    tokens = [IM_START, *ids_of(rust, "fox"), IM_END, EOS]
    assert "".join(push_all(rust, [], tokens)) == "fox"
    assert "".join(push_all(rust, [], tokens, skip_special_tokens=False)) == "<|im_start|>fox<|im_end|></s>"


def test_text_after_special_tokens(rust: RustTokenizer) -> None:
    """A prompt that ends in special tokens, as every chat does, adds nothing to the text and takes nothing from it."""
    for skip in (True, False):
        for prompt in ([IM_START], [IM_END] * 8, [*ids_of(rust, "a fox"), EOS, *[IM_START] * 7]):
            assert "".join(push_all(rust, prompt, ids_of(rust, " the dog"), skip_special_tokens=skip)) == " the dog"


def test_genuine_replacement_characters(rust: RustTokenizer) -> None:
    """U+FFFD in the text itself is text, once it is clear that nothing completes it."""
    text = f"a{REPLACEMENT}b{REPLACEMENT}{REPLACEMENT}c"
    assert "".join(push_all(rust, [], ids_of(rust, text))) == text


def test_words_with_and_without_a_space(pieces: RustTokenizer) -> None:
    """Where a tokenizer marks the start of a word, the space before the first generated word is there after a prompt, and
    not at the start of a text."""
    the, fox, jump, s = (id_of(pieces, token) for token in ("▁the", "▁fox", "jump", "s"))
    assert push_all(pieces, [the], [fox, jump, s]) == [" fox", "jump", "s"]
    assert push_all(pieces, [], [the, fox]) == ["the", " fox"]
    assert push_all(pieces, [the] * 20, [jump]) == ["jump"]


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 8), min_size=1, max_size=12), text=TEXTS | HARD_TEXTS, words=st.lists(st.integers(1, 8))
)
def test_pieces_with_byte_fallback(pieces: RustTokenizer, prompt: list[int], text: str, words: list[int]) -> None:
    """The same holds for such a tokenizer, with characters spelled in bytes: what went out, after what the prompt says, is
    what decode() makes of both together."""
    tokens = [*(id_of(pieces, f"<0x{byte:02X}>") for byte in text.encode()), *words]
    emitted = "".join(push_all(pieces, prompt, tokens))
    assert pieces.decode(prompt) + emitted == pieces.decode([*prompt, *tokens])


def test_decoder_of_a_loaded_tokenizer(tmp_path: Path) -> None:
    """HfTokenizer.incremental is such a decoder."""
    tokenizer = HfTokenizerFactory().load(save_tokenizer(tmp_path))
    [prompt, tokens] = tokenizer.encode_batch(["The quick", " brown 🙂"], add_special_tokens=False)
    decoder = tokenizer.incremental(prompt, skip_special_tokens=True)
    assert "".join(decoder.push(token) for token in tokens) == " brown 🙂"


# -- stop strings ---------------------------------------------------------------------------------------------------------

# Few letters, so that strings overlap themselves and each other.
LETTERS = st.sampled_from("ab🙂")
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)


def cut_at_first_stop(text: str, strings: Sequence[str], *, include: bool) -> str | None:
    """The text up to the match that ends first (the longest of those that end there), the slow way; None without any."""
    for end in range(1, len(text) + 1):
        matches = [len(string) for string in strings if text[:end].endswith(string)]
        if matches:
            return text[: end if include else end - max(matches)]
    return None


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.text(LETTERS, max_size=6), max_size=12), strings=STOPS, include=st.booleans())
@example(pieces=["aab"], strings=["ab", "b"], include=False)
@example(pieces=["a", "a", "b"], strings=["aab", "ab"], include=False)
@example(pieces=["ab", "ab", "b"], strings=["ababb", "bab"], include=False)
def test_stop_strings(pieces: list[str], strings: list[str], include: bool) -> None:
    """However a text is cut into pieces, what goes out is the text up to the stop string that ends first; nothing of a stop
    string goes out before it is found, and nothing is held back in vain."""
    text = "".join(pieces)
    expected = cut_at_first_stop(text, strings, include=include)
    stop = StopStrings(strings, include=include)
    emitted, taken = "", ""
    for piece in pieces:
        taken += piece
        out, found = stop.push(piece)
        emitted += out
        assert found == (cut_at_first_stop(taken, strings, include=include) is not None)
        if found:
            assert emitted == expected
            assert stop.flush() == ""
            return
        starts = [string[:length] for string in strings for length in range(len(string))]
        held = max((start for start in starts if taken.endswith(start)), key=len)
        assert emitted == taken.removesuffix(held)
    assert expected is None
    assert emitted + stop.flush() == text
    assert stop.flush() == ""


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(TEXTS, max_size=5), include=st.booleans())
def test_no_stop_strings(pieces: list[str], include: bool) -> None:
    """Without stop strings every piece goes out as it is."""
    stop = StopStrings([], include=include)
    assert [stop.push(piece) for piece in pieces] == [(piece, False) for piece in pieces]
    assert stop.flush() == ""


def test_long_stop_strings_are_fast() -> None:
    """The most and longest strings that a request may have, in a text that matches one of them all along, and almost
    matches the others, take little time."""
    length = MAX_STOP_LENGTH - 1
    others = ["a" * index + "b" + "a" * (length - index) for index in range(MAX_STOP_STRINGS - 1)]
    start = time.perf_counter()
    stop = StopStrings(["a" * length + "c", *others], include=False)
    emitted = "".join(stop.push("a")[0] for _ in range(length + 100))
    assert emitted == "a" * 100
    assert stop.push("c") == ("", True)
    assert time.perf_counter() - start < 2.0
