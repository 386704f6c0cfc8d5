"""Tokens to text as they come, and stop strings in a text that comes in pieces."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from ferrum_rt.interfaces.requests import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer
from ferrum_rt.interfaces.types import TokenId
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.text.detokenizer import StopStrings, incremental_decoder
from ferrum_rt.runtime.text.token_bytes import TokenBytes
from tests.checkpoints import BOS, EOS, IM_END, IM_START, VOCAB_SIZE, save_tokenizer

REPLACEMENT = "\ufffd"

# Any text that UTF-8 can write, but for U+FFFD: where that is, half a character cannot be told from a whole one.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=60)
# Of many bytes each, so that tokens end inside characters; joined ones; and white space.
HARD_TEXTS = st.text(st.sampled_from("aé你🙂👩‍🦰\u0301ﷺ \n\t"), max_size=40)
# A byte-level vocabulary of nearly nothing but bytes makes nearly any sequence invalid UTF-8.
TOKENS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40)

WORDS = ["<unk>", "▁the", "▁fox", "▁", "▁▁", "jump", "s", "▁naïve", "▁你好", "é", "�", "</s>"]
PIECES = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
END = WORDS.index("</s>")
PIECE_IDS = st.lists(st.integers(0, len(WORDS) - 1) | st.integers(len(WORDS), len(PIECES) - 1), max_size=20)

# As a byte-level pre-tokenizer writes bytes: those that are not printable as the last of its letters, in order.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_NAMES = dict(zip(sorted(range(256), key=lambda byte: chr(byte) not in ALPHABET), ALPHABET, strict=True))

LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
UNKNOWN = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])


def with_decoder(decoder: decoders.Decoder | None) -> RustTokenizer:
    """A tokenizer of the older kind, as in Llama 2 and Gemma: words start with "▁", and what is not in the vocabulary is
    written as bytes."""
    vocabulary = {token: index for index, token in enumerate(PIECES)}
    tokenizer = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


@pytest.fixture(scope="module")
def rust(tmp_path_factory: pytest.TempPathFactory) -> RustTokenizer:
    """A byte-level BPE, as Llama 3, Qwen and most newer models have."""
    return RustTokenizer.from_file(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"))


@pytest.fixture(scope="module")
def pieces() -> RustTokenizer:
    """One that drops a text's first space."""
    return with_decoder(LLAMA)


def ids_of(rust: RustTokenizer, text: str) -> list[TokenId]:
    return [TokenId(token) for token in rust.encode(text, add_special_tokens=False).ids]


def id_of(rust: RustTokenizer, token: str) -> TokenId:
    found = rust.token_to_id(token)
    assert found is not None
    return TokenId(found)


def decoder_of(rust: RustTokenizer, prompt: Sequence[int], *, skip: bool = True) -> IncrementalTokenizer:
    tokens = [TokenId(token) for token in prompt]
    return incremental_decoder(TokenBytes(rust), tokens, skip_special_tokens=skip)


def push_all(rust: RustTokenizer, prompt: Sequence[int], tokens: Sequence[int], *, skip: bool = True) -> list[str]:
    """What each token adds to the text, after ``prompt``, and last what is left at the end."""
    decoder = decoder_of(rust, prompt, skip=skip)
    return [*(decoder.push(TokenId(token)) for token in tokens), decoder.flush()]


def bytes_of(token: int, *, skip: bool) -> bytes:
    """What a token of PIECES is."""
    if token == END and skip:
        return b""
    return PIECES[token].replace("▁", " ").encode() if token < len(WORDS) else bytes([token - len(WORDS)])


def cut_half_character(data: bytes) -> bytes:
    """All but the first bytes of a character that could go on."""
    for length in (1, 2, 3):
        tail = data[-length:]
        if len(tail) == length and any(is_character(tail + rest) for rest in CONTINUATIONS):
            return data[:-length]
    return data


# After F0 and E0 come only high bytes, after F4 and ED only low ones.
CONTINUATIONS = [byte * count for byte in (b"\x80", b"\xbf") for count in (1, 2, 3)]


def is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


# -- byte-level tokenizers ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS | HARD_TEXTS, text=TEXTS | HARD_TEXTS)
def test_pieces_are_the_text(rust: RustTokenizer, prompt: str, text: str) -> None:
    """The pieces of a text, after any prompt, are the text, and none of them has half a character."""
    emitted = push_all(rust, ids_of(rust, prompt), ids_of(rust, text))
    assert "".join(emitted) == text
    assert not any(REPLACEMENT in piece for piece in emitted)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(prompt=TOKENS, tokens=TOKENS, skip=st.booleans())
@example(prompt=[], tokens=[BOS, 0x2C, EOS, IM_START], skip=False)
@example(prompt=[], tokens=[174, 99], skip=False)  # the start of a surrogate
@example(prompt=[174, 99], tokens=[100], skip=False)
def test_pieces_of_any_tokens(rust: RustTokenizer, prompt: list[int], tokens: list[int], skip: bool) -> None:
    """Whatever tokens a model comes up with, after whatever prompt, at any time what has gone out is what decode() makes of
    prompt and output together, after the prompt's whole characters and but for half a character at the end."""
    decoder = decoder_of(rust, prompt, skip=skip)
    emitted = rust.decode(prompt, skip_special_tokens=skip)
    if decoder.num_held_bytes:
        emitted = emitted.removesuffix(REPLACEMENT)
    for count, token in enumerate(tokens, start=1):
        emitted += decoder.push(TokenId(token))
        whole = rust.decode(prompt + tokens[:count], skip_special_tokens=skip)
        assert whole.startswith(emitted)
        assert len(whole) - len(emitted) <= decoder.num_held_bytes <= 3
    is_held = decoder.num_held_bytes > 0
    rest = decoder.flush()
    assert emitted + rest + (REPLACEMENT if is_held and not rest else "") == rust.decode(
        prompt + tokens, skip_special_tokens=skip
    )
    assert decoder.num_held_bytes == 0


@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS | HARD_TEXTS, text=TEXTS | HARD_TEXTS)
def test_held_bytes_place_the_tokens(rust: RustTokenizer, prompt: str, text: str) -> None:
    """The UTF-8 bytes that have gone out and those held back are at any time the bytes of the tokens so far."""
    decoder = decoder_of(rust, ids_of(rust, prompt))
    token_bytes = TokenBytes(rust)
    num_sent = num_pushed = 0
    for token in ids_of(rust, text):
        num_sent += len(decoder.push(token).encode())
        num_pushed += len(token_bytes[token])
        assert num_sent + decoder.num_held_bytes == num_pushed


def byte_ids(rust: RustTokenizer, data: bytes) -> list[TokenId]:
    """One token per byte, with no merges."""
    return [id_of(rust, BYTE_NAMES[byte]) for byte in data]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(before=TEXTS, after=TEXTS | HARD_TEXTS, inside=st.sampled_from("é你🙂"), cut=st.integers(1, 3))
def test_prompt_that_ends_inside_a_character(rust: RustTokenizer, before: str, after: str, inside: str, cut: int) -> None:
    """After a prompt that ends inside a character, the output begins with that character, if it goes on with it."""
    character = inside.encode()
    cut = min(cut, len(character) - 1)
    prompt = ids_of(rust, before) + byte_ids(rust, character[:cut])
    assert decoder_of(rust, prompt).num_held_bytes == cut
    assert "".join(push_all(rust, prompt, byte_ids(rust, character[cut:]) + ids_of(rust, after))) == inside + after


def test_output_that_ends_inside_a_character(rust: RustTokenizer) -> None:
    """Half a character at the end is not shown, and whole ones before it have long gone out."""
    tokens = byte_ids(rust, "é🙂".encode() + "🙂".encode()[:3])
    assert "".join(push_all(rust, [], tokens)) == "é🙂"


def test_special_tokens_are_skipped_or_written(rust: RustTokenizer) -> None:
    """Special tokens add nothing when they are skipped, and their text when they are not."""
    tokens = [IM_START, *ids_of(rust, "fox"), IM_END, EOS]
    assert "".join(push_all(rust, [], tokens)) == "fox"
    assert "".join(push_all(rust, [], tokens, skip=False)) == "<|im_start|>fox<|im_end|></s>"


def test_text_after_special_tokens(rust: RustTokenizer, pieces: RustTokenizer) -> None:
    """A prompt that ends in special tokens, as every chat does, adds nothing to the text and takes nothing from it."""
    for skip in (True, False):
        for prompt in ([IM_START], [IM_END] * 8, [*ids_of(rust, "a fox"), EOS, *[IM_START] * 7]):
            assert "".join(push_all(rust, prompt, ids_of(rust, " the dog"), skip=skip)) == " the dog"
    the, fox = id_of(pieces, "▁the"), id_of(pieces, "▁fox")
    assert push_all(pieces, [the, *[END] * 8], [fox]) == [" fox", ""]


def test_genuine_replacement_characters(rust: RustTokenizer) -> None:
    """U+FFFD in the text itself is text, at its end too."""
    text = f"a{REPLACEMENT}b{REPLACEMENT}{REPLACEMENT}"
    assert "".join(push_all(rust, [], ids_of(rust, text))) == text


def test_invalid_bytes_take_linear_time_and_no_room(rust: RustTokenizer) -> None:
    """However many invalid bytes follow each other, each goes out as it comes."""
    decoder, [token] = decoder_of(rust, []), byte_ids(rust, b"\x80")
    start = time.perf_counter()
    for _ in range(100_000):
        assert decoder.push(token) == REPLACEMENT
    assert decoder.num_held_bytes == 0
    assert time.perf_counter() - start < 2.0


# -- tokenizers that spell with "▁" and bytes -----------------------------------------------------------------------------


def test_words_with_and_without_a_space(pieces: RustTokenizer) -> None:
    """Where a tokenizer marks the start of a word, the space before the first generated word is there after a prompt, and
    not at the start of a text."""
    the, fox, jump, s = (id_of(pieces, token) for token in ("▁the", "▁fox", "jump", "s"))
    assert push_all(pieces, [the], [fox, jump, s]) == [" fox", "jump", "s", ""]
    assert push_all(pieces, [], [the, fox]) == ["the", " fox", ""]
    assert push_all(pieces, [the] * 20, [jump]) == ["jump", ""]
    assert push_all(pieces, [END], [fox]) == ["fox", ""]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [LLAMA, GEMMA, METASPACE, decoders.Metaspace(prepend_scheme="never")])
@settings(max_examples=100, deadline=None)
@given(prompt=PIECE_IDS, words=PIECE_IDS, text=TEXTS | HARD_TEXTS, skip=st.booleans())
def test_pieces_with_byte_fallback(
    decoder: decoders.Decoder, prompt: list[int], words: list[int], text: str, skip: bool
) -> None:
    """The same holds for such tokenizers where bytes spell characters: what the prompt says and what went out is what
    decode() makes of both together."""
    rust = with_decoder(decoder)
    prompt, words = ([token for token in tokens if token < len(WORDS)] for tokens in (prompt, words))
    if "ByteFallback" in repr(decoder) and "▁" not in text:
        words += [len(WORDS) + byte for byte in text.encode()]
    emitted = "".join(push_all(rust, prompt, words, skip=skip))
    decoded = [rust.decode(tokens, skip_special_tokens=skip) for tokens in (prompt, prompt + words)]
    assert decoded[0] + emitted == decoded[1]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [GEMMA, LLAMA])
@settings(max_examples=200, deadline=None)
@given(prompt=PIECE_IDS, tokens=PIECE_IDS, skip=st.booleans())
def test_pieces_with_any_bytes(decoder: decoders.Decoder, prompt: list[int], tokens: list[int], skip: bool) -> None:
    """Bytes that are not UTF-8 are shown as U+FFFD and take nothing from what is around them. (Here decode() is no measure:
    it shows nothing of a row of bytes if any of them is wrong, which a stream cannot do.)"""
    before, after = (b"".join(bytes_of(token, skip=skip) for token in part) for part in (prompt, tokens))
    start = len(cut_half_character(before))
    expected = cut_half_character((before + after)[start:]).decode(errors="replace")
    if decoder is LLAMA and not before:
        expected = expected.removeprefix(" ")
    assert "".join(push_all(with_decoder(decoder), prompt, tokens, skip=skip)) == expected


# -- other decoders -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(cleanup=False), decoders.BPEDecoder("p")], ids=repr)
@settings(max_examples=100, deadline=None)
@given(prompt=PIECE_IDS, tokens=PIECE_IDS, skip=st.booleans())
def test_pieces_of_other_decoders(
    decoder: decoders.Decoder | None, prompt: list[int], tokens: list[int], skip: bool
) -> None:
    """Where a token's text depends on its neighbours, the pieces are what decode() makes of prompt and output together, and
    nothing is held back."""
    rust = with_decoder(decoder)
    emitted = "".join(push_all(rust, prompt, tokens, skip=skip))
    decoded = [rust.decode(part, skip_special_tokens=skip) for part in (prompt, prompt + tokens)]
    assert decoded[0] + emitted == decoded[1]


@settings(max_examples=100, deadline=None)
@given(prompt=st.lists(st.integers(1, 9), max_size=5), text=HARD_TEXTS, words=st.lists(st.integers(1, 9)))
def test_pieces_of_an_unknown_decoder_with_bytes(prompt: list[int], text: str, words: list[int]) -> None:
    """A decoder that puts characters together in a way of its own has its half characters held back."""
    rust = with_decoder(UNKNOWN)
    assert not TokenBytes(rust).is_exact
    tokens = [*(len(WORDS) + byte for byte in text.encode()), *words]
    emitted = push_all(rust, prompt, tokens)
    assert rust.decode(prompt) + "".join(emitted) == rust.decode(prompt + tokens)
    assert not any(REPLACEMENT in piece for piece in emitted)


def test_unknown_decoder_at_the_end_and_without_one() -> None:
    """Such a decoder, too, shows no half character at the end, and does not wait for the end of one for ever."""
    rust = with_decoder(UNKNOWN)
    half = [len(WORDS) + byte for byte in "🙂".encode()[:3]]
    decoder = decoder_of(rust, [])
    assert [decoder.push(TokenId(token)) for token in half] == ["", "", ""]
    assert decoder.num_held_bytes > 0
    assert decoder.flush() == ""
    assert decoder.num_held_bytes == 0
    invalid = push_all(rust, [], [len(WORDS) + 0x80] * 400)
    assert "".join(invalid) == REPLACEMENT * 400
    assert max(map(len, invalid)) == 4


def test_unknown_decoder_with_characters_and_a_half() -> None:
    """The whole characters of a token that ends inside one are not lost at the end."""
    rust = RustTokenizer(models.BPE({"aÃ": 0, "©": 1}, []))
    rust.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")])
    assert push_all(rust, [], [0, 1]) == ["", "aé", ""]
    assert push_all(rust, [], [0]) == ["", "a"]


def test_tokens_that_say_nothing() -> None:
    """An id that is no token's adds nothing, and the next word is written as after the one before."""
    assert push_all(with_decoder(None), [], [1, 9999, 2]) == ["▁the", "", " ▁fox", ""]


# -- the bytes of tokens --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS)
def test_bytes_are_the_text(rust: RustTokenizer, tokens: list[int]) -> None:
    """The bytes of a byte-level tokenizer's tokens, one after the other, are the bytes of their text."""
    token_bytes = TokenBytes(rust)
    joined = b"".join(token_bytes[token] for token in tokens)
    assert joined.decode(errors="replace") == rust.decode(tokens, skip_special_tokens=False)


def test_bytes_of_each_token(rust: RustTokenizer) -> None:
    """Each token alone has the bytes that decode() shows; an added token has its name; what is no token has none."""
    token_bytes = TokenBytes(rust)
    for byte in range(256):
        assert token_bytes[byte_ids(rust, bytes([byte]))[0]] == bytes([byte])
    assert token_bytes[IM_START] == b"<|im_start|>"
    added = RustTokenizer.from_str(rust.to_str())
    added.add_tokens(["<\uff45nd>"])
    assert TokenBytes(added)[id_of(added, "<\uff45nd>")] == "<\uff45nd>".encode()
    assert token_bytes[VOCAB_SIZE + 7] == token_bytes.at_start(VOCAB_SIZE + 7) == b""
    assert VOCAB_SIZE + 7 not in token_bytes


@pytest.mark.parametrize("decoder", [LLAMA, GEMMA, METASPACE])
def test_bytes_of_pieces(decoder: decoders.Decoder) -> None:
    """Tokens that spell bytes are those bytes, and "▁" is a space; at the start of a text it may be nothing."""
    token_bytes = TokenBytes(with_decoder(decoder))
    assert token_bytes.is_exact
    assert [token_bytes[token] for token in range(len(PIECES))] == [
        bytes_of(token, skip=False) for token in range(len(PIECES))
    ]
    two = WORDS.index("▁▁")
    assert token_bytes.at_start(two) == (b" " if decoder is LLAMA else b"  " if decoder is GEMMA else b"")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Replace(Regex("▁"), " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
        None,
    ],
    ids=repr,
)
def test_bytes_of_other_tokens(decoder: decoders.Decoder | None) -> None:
    """With a decoder of another kind, a token's bytes are what it adds to a text that already has it."""
    rust = with_decoder(decoder)
    token_bytes = TokenBytes(rust)
    assert not token_bytes.is_exact
    jump = id_of(rust, "jump")
    assert rust.decode([jump]).encode() + token_bytes[jump] == rust.decode([jump, jump]).encode()


def test_decoder_of_a_loaded_tokenizer(tmp_path: Path) -> None:
    """HfTokenizer.incremental is such a decoder, and token_bytes such bytes."""
    tokenizer = HfTokenizerFactory().load(save_tokenizer(tmp_path))
    [prompt, tokens] = tokenizer.encode_batch(["The quick", " brown 🙂"], add_special_tokens=False)
    decoder = tokenizer.incremental(prompt, skip_special_tokens=True)
    assert "".join(decoder.push(token) for token in tokens) == " brown 🙂"
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode() == " brown 🙂"


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
