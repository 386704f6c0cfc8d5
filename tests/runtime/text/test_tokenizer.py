"""Text to tokens and back, and chat messages to prompts."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from ferrum_rt.interfaces.errors import RequestValidationError, TokenizerError
from ferrum_rt.interfaces.types import ChatMessage, SpecialTokens, TokenId
from ferrum_rt.runtime.loading.tokenizer_files import HfTokenizerFactory
from ferrum_rt.runtime.text.tokenizer import HfTokenizer
from tests.checkpoints import BOS, CHAT_TEMPLATE, EOS, IM_END, IM_START, PAD, VOCAB_SIZE, save_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MESSAGES = [
    ChatMessage(role="system", content="Be brief."),
    ChatMessage(role="user", content="Wie groß ist die Größe?\n"),
    ChatMessage(role="assistant", content="So <groß> & 'weit'."),
    ChatMessage(role="user", content=" danke 🙂"),
]

WithTemplate = Callable[[str], HfTokenizer]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's directory; not to be written to."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> HfTokenizer:
    return HfTokenizerFactory().load(directory)


@pytest.fixture
def with_template(tmp_path: Path) -> WithTemplate:
    """Loads the tokenizer with another chat template."""

    def load(template: str) -> HfTokenizer:
        return HfTokenizerFactory().load(save_tokenizer(tmp_path, chat_template=template))

    return load


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes), encoding="utf-8")


def render(tokenizer: HfTokenizer, messages: list[ChatMessage]) -> str:
    """The prompt that the chat template makes, with its special tokens written out."""
    return tokenizer.decode(tokenizer.encode_chat(messages), skip_special_tokens=False)


# -- text and tokens ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), special=st.booleans())
def test_round_trip(tokenizer: HfTokenizer, texts: list[str], special: bool) -> None:
    """Texts that are encoded together, with or without special tokens, decode to themselves, each like alone."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=special)
    assert [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in encoded] == texts
    assert encoded == [tokenizer.encode_batch([text], add_special_tokens=special)[0] for text in texts]


def test_special_tokens_are_added_where_wanted(tokenizer: HfTokenizer) -> None:
    """The tokenizer's own special tokens come with a text only if asked for."""
    [without] = tokenizer.encode_batch(["fox"], add_special_tokens=False)
    assert tokenizer.encode_batch(["fox", ""], add_special_tokens=True) == [[BOS, *without], [BOS]]
    assert tokenizer.encode_batch([""], add_special_tokens=False) == [[]]


def test_special_tokens_in_text(tokenizer: HfTokenizer) -> None:
    """A special token that is written out is text, unless it is to be parsed; then it is that token, and is decoded to its
    text unless it is to be skipped."""
    text = "<|im_start|>fox<|im_end|>"
    [plain] = tokenizer.encode_batch([text], add_special_tokens=False)
    assert min(plain) > IM_END
    assert tokenizer.decode(plain, skip_special_tokens=True) == text
    [tokens] = tokenizer.encode_batch([text], add_special_tokens=False, parse_special_tokens=True)
    assert (tokens[0], tokens[-1]) == (IM_START, IM_END)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "fox"
    assert tokenizer.encode_batch([text], add_special_tokens=True) == [[BOS, *plain]]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"], ids=ascii)
def test_text_that_is_not_unicode(tokenizer: HfTokenizer, text: str) -> None:
    """Half of a surrogate pair, which no text can hold, is a TokenizerError."""
    with pytest.raises(TokenizerError, match="cannot be tokenized"):
        tokenizer.encode_batch(["fine", text], add_special_tokens=False)


def test_threads(tokenizer: HfTokenizer) -> None:
    """A tokenizer can be used from several threads at once."""
    texts = [f"the {number} foxes jump 🙂" for number in range(200)]
    expected = tokenizer.encode_batch(texts, add_special_tokens=True)
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda text: tokenizer.encode_batch([text], add_special_tokens=True)[0], texts)
        assert list(found) == expected


def test_texts_are_neither_cut_nor_filled_up(directory: Path, tmp_path: Path) -> None:
    """What tokenizer.json says of a text's length, which was right for training, is not followed."""
    rust = RustTokenizer.from_file(str(directory / "tokenizer.json"))
    rust.enable_truncation(5)
    rust.enable_padding(length=100)
    rust.save(str(tmp_path / "tokenizer.json"))
    [tokens] = HfTokenizerFactory().load(tmp_path).encode_batch(["The quick fox 🙂"], add_special_tokens=False)
    assert 5 < len(tokens) < 100
    assert PAD not in tokens


# -- what is known of a tokenizer -----------------------------------------------------------------------------------------


def test_info(tokenizer: HfTokenizer) -> None:
    """The tokenizer's size, special tokens and chat template are reported."""
    assert tokenizer.info.vocab_size == VOCAB_SIZE
    assert tokenizer.info.special_tokens == SpecialTokens(bos=TokenId(BOS), eos=(TokenId(EOS),), pad=TokenId(PAD))
    assert tokenizer.info.chat_template is not None


def test_end_tokens_of_the_model_go_first(directory: Path) -> None:
    """End tokens that the model's own files name replace the tokenizer's."""
    given_ids = (TokenId(7), TokenId(8))
    assert HfTokenizerFactory(given_ids).load(directory).info.special_tokens.eos == given_ids


def test_special_tokens_as_objects(tmp_path: Path) -> None:
    """A special token may be written as an object with its content; one that is null or unknown is none."""
    save_tokenizer(tmp_path)
    edit_config(tmp_path, bos_token={"content": "<|im_start|>", "lstrip": False}, eos_token="<unknown>", pad_token=None)
    special = HfTokenizerFactory().load(tmp_path).info.special_tokens
    assert special == SpecialTokens(bos=TokenId(IM_START), eos=(), pad=None)


@pytest.mark.parametrize("value", [5, {"content": 5}, {}, [], True], ids=str)
def test_special_tokens_that_are_no_text(tmp_path: Path, value: Any) -> None:
    """What is no token's text is taken for none."""
    save_tokenizer(tmp_path)
    edit_config(tmp_path, eos_token=value)
    assert HfTokenizerFactory().load(tmp_path).info.special_tokens.eos == ()


def test_tokenizer_alone(tmp_path: Path) -> None:
    """tokenizer.json is enough: without a config there are no special tokens and there is no chat."""
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = HfTokenizerFactory().load(tmp_path)
    assert tokenizer.info.special_tokens == SpecialTokens()
    assert tokenizer.info.chat_template is None


# -- chat templates -------------------------------------------------------------------------------------------------------


def test_chat(tokenizer: HfTokenizer) -> None:
    """The template of tokenizer_config.json is rendered up to where the assistant is to go on."""
    assert render(tokenizer, MESSAGES[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWie groß ist die Größe?\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    """chat_template.jinja goes before the template in tokenizer_config.json."""
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}ß", encoding="utf-8")
    assert render(HfTokenizerFactory().load(tmp_path), MESSAGES) == "Be brief.ß"


def test_several_templates(tmp_path: Path) -> None:
    """Of several templates by name the default one is taken; without it there is no chat."""
    save_tokenizer(tmp_path)
    tool_use = {"name": "tool_use", "template": "tools"}
    edit_config(tmp_path, chat_template=[tool_use, {"name": "default", "template": "plain"}])
    assert render(HfTokenizerFactory().load(tmp_path), MESSAGES) == "plain"
    useless: list[Any] = [[tool_use], [{"name": "default"}], [{}], ["default"], [], 5, None]
    for templates in useless:
        edit_config(tmp_path, chat_template=templates)
        assert HfTokenizerFactory().load(tmp_path).info.chat_template is None


def test_no_template(tmp_path: Path) -> None:
    """Chat with a model that has no template is refused, and the message says what to send instead."""
    tokenizer = HfTokenizerFactory().load(save_tokenizer(tmp_path, chat_template=None))
    assert tokenizer.info.chat_template is None
    with pytest.raises(RequestValidationError, match=r"prompt: .* no chat template; send text or token ids"):
        tokenizer.encode_chat(MESSAGES)


def test_raise_exception(with_template: WithTemplate) -> None:
    """What a template complains about with raise_exception is said to the caller."""
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestValidationError, match=r"prompt: .*roles must alternate"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.nothing() }}",
        "{{ nothing.at_all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% include 'other.jinja' %}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ messages | map('nothing') | list }}",
    ],
)
def test_template_that_fails(with_template: WithTemplate, template: str) -> None:
    """A template that fails on these messages fails this request, whatever it raises."""
    tokenizer = with_template(template)
    with pytest.raises(RequestValidationError, match="prompt: the model's chat template"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_template_that_breaks_out(with_template: WithTemplate, template: str) -> None:
    """A template can neither reach Python's internals nor change what it is given."""
    tokenizer = with_template(template)
    with pytest.raises(RequestValidationError, match="prompt: the model's chat template"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize("template", ["{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}"])
def test_template_that_looks_inside(with_template: WithTemplate, template: str) -> None:
    """Where a template only shows Python's internals, it shows nothing."""
    assert render(with_template(template), MESSAGES) == ""


@pytest.mark.parametrize("template", ["{% for %}", "{{", "{% endif %}", "{{ messages | no_such_filter }}", "{% nothing %}"])
def test_broken_template(with_template: WithTemplate, template: str) -> None:
    """A template that is not valid jinja2 is a TokenizerError at load, which names the file."""
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: the chat template is not valid"):
        with_template(template)


TEMPLATES = [
    CHAT_TEMPLATE,
    # The shape of Llama 2's and Mistral's: special tokens by name, string methods, white space control, slices.
    "{{ bos_token }}{% for message in messages[1:] %}{%- if message['role'] == 'user' -%}\n"
    "  {{ '[INST] ' + message['content'] | trim + ' [/INST]' }}\n"
    "{%- else -%}\n  {{ ' ' + message['content'].strip() + eos_token }}\n{%- endif %}\n{%- endfor %}",
    # Statements on lines of their own leave no line behind.
    "{% for message in messages %}\n    {% set last = loop.last %}\n{{ message.role }}\n    {% if last %}\nend\n"
    "    {% endif %}\n{% endfor %}\n",
    # Loop controls, as in Qwen 3's.
    "{% for message in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}"
    "{% endif %}{{ message.content }}{% endfor %}",
    # A namespace, tests for what is not given, and loops backwards.
    "{% set ns = namespace(found=false) %}{% for message in messages[::-1] %}"
    "{% if message.role == 'user' and not ns.found %}{% set ns.found = true %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if tools %}T{% endif %}{{ 'yes' if enable_thinking is defined and enable_thinking else 'no' }}{{ unk_token }}",
    # JSON, in each of the ways that templates ask for it.
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ messages | tojson(ensure_ascii=False) }}",
    "{{ messages | tojson(ensure_ascii=True, indent=4, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':')) }}",
    # What the assistant says is marked for training.
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    """Templates use jinja2 as transformers sets it up, and give the same prompts here."""
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path, chat_template=template)
    peer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    turns = [{"role": message.role, "content": message.content} for message in MESSAGES]
    expected = peer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(HfTokenizerFactory().load(tmp_path), MESSAGES) == expected


@pytest.mark.slow
def test_tokens_equal_transformers(directory: Path, tokenizer: HfTokenizer) -> None:
    """A text and a rendered chat have the same tokens as in transformers."""
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast.from_pretrained(directory)
    text = "The quick brown fox. Größe 你好 🙂"
    for special in (True, False):
        assert tokenizer.encode_batch([text], add_special_tokens=special) == [peer.encode(text, add_special_tokens=special)]
    turns = [{"role": message.role, "content": message.content} for message in MESSAGES]
    assert tokenizer.encode_chat(MESSAGES) == peer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
