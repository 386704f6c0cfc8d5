"""Chat templates: the same prompts as in transformers, and nothing that a template does outlasts its request."""

import json
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ferrum_rt.interfaces.errors import RequestValidationError, TokenizerError
from ferrum_rt.interfaces.types import ChatMessage, Tool
from ferrum_rt.runtime.text.chat_template import MAX_TEMPLATE, ChatTemplate
from tests.machine import seconds_here
from tests.runtime.text.chat_templates import (
    CONVERSATIONS,
    SPECIAL_TOKENS,
    TEMPLATES,
    TOOLS,
    assistant,
    result,
    system,
    tool,
    user,
)

Peer = Callable[[str, Any, Any], str | None]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, SPECIAL_TOKENS, "here")


def render(source: str, messages: list[ChatMessage] | None = None, tools: list[Tool] | None = None) -> str:
    return template(source).render(messages or [user("Hi")], tools or [])


# -- what a template sees -------------------------------------------------------------------------------------------------


def shown(messages: list[ChatMessage], tools: list[Tool] | None = None, **options: Any) -> Any:
    """What a template is given, by way of JSON."""
    return json.loads(
        template("{{ {'messages': messages, 'tools': tools} | tojson }}").render(messages, tools or [], **options)
    )


def test_messages() -> None:
    """A turn is its role and content; a name, calls and the call that it answers are there only where they are set."""
    named = ChatMessage(role="user", content="a", name="Ada")
    assert shown([system(""), named, assistant("", now="{}"), result("12:00")])["messages"] == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a", "name": "Ada"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "now", "arguments": {}}}],
        },
        {"role": "tool", "content": "12:00", "tool_call_id": "call00000"},
    ]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ('{"a": {"b": [1, null]}}', {"a": {"b": [1, None]}}),
        ('{"ä": "\\u00e4"}', {"ä": "ä"}),
        *((text, text) for text in ("[1]", '"a"', "3", "null", "{", "", "{'a': 1}", "[" * 500)),
    ],
)
def test_arguments(text: str, seen: Any) -> None:
    """Arguments that are a JSON object are given as one; others as the text that they are."""
    [turn] = shown([assistant("", call=text)])["messages"]
    assert turn["tool_calls"][0]["function"] == {"name": "call", "arguments": seen}


def test_tools() -> None:
    """Tools have OpenAI's shape; where there are none, the variable is none."""
    function = {"name": "f", "description": "does", "parameters": {"type": "object"}}
    assert shown([user("a")], [tool("f", "does", type="object")])["tools"] == [{"type": "function", "function": function}]
    assert shown([user("a")])["tools"] is None


def test_every_string_of_the_caller_is_protected() -> None:
    """``protect`` is applied to contents, names, ids, arguments and schemas, to keys too, but not to roles."""
    messages = [
        ChatMessage(role="user", content="X1", name="X2"),
        ChatMessage(role="tool", content="X3", tool_call_id="X4"),
        assistant("X5", X6='{"X7": ["X8", {"X9": "X10"}], "a": 1}', X11="X12"),
    ]
    tools = [tool("X13", "X14", X15={"X16": ["X17", 1, None]}, type="object")]

    def protect(text: str) -> str:
        return text.replace("X", "<X>").replace("c", "<c>")

    seen = json.dumps(shown(messages, tools, protect=protect))
    assert all(f"<X>{number}" in seen for number in range(1, 18))
    assert seen.count("X") == seen.count("<X>") == 17
    assert "<c>all00000" in seen
    assert '"role": "user"' in seen
    assert '"function"' in seen


def test_messages_that_nest_too_deeply() -> None:
    """A schema or arguments of many levels, on which Python itself gives up, fail the request."""
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(RequestValidationError, match=r"^prompt: "):
        render("x", tools=[tool("f", **deep)])
    with pytest.raises(RequestValidationError, match=r"^prompt: "):
        render("x", [assistant("", f='{"a":' * 5000 + "1" + "}" * 5000)])


@pytest.mark.parametrize("source", ["{{ x", "{% for a in b %}", "{{ a | no_such_filter }}", "{{ 9" + "9" * 5000 + " }}"])
def test_what_is_no_template(source: str) -> None:
    """Whatever cannot be compiled is a TokenizerError that names the file."""
    with pytest.raises(TokenizerError, match=r"^here: the chat template is not valid jinja2: "):
        template(source)


def test_source_without_end() -> None:
    """A template much longer than the longest in use is refused before it is parsed; one too deep for Python is an error."""
    assert render("a" * MAX_TEMPLATE) == "a" * MAX_TEMPLATE
    with pytest.raises(TokenizerError, match=r"^here: the chat template is longer than"):
        template("a" * (MAX_TEMPLATE + 1))
    with pytest.raises(TokenizerError, match=r"^here: the chat template is not valid"):
        template("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}")


# -- the same as in transformers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> Peer:
    """Renders as transformers does; None where it refuses."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, **SPECIAL_TOKENS)

    def render_peer(source: str, turns: Any, tools: Any) -> str | None:
        try:
            prompt = tokenizer.apply_chat_template(
                turns, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=True
            )
        except Exception:
            return None
        assert isinstance(prompt, str)
        return prompt

    return render_peer


def attempt(compiled: ChatTemplate, messages: list[ChatMessage], tools: list[Tool]) -> str | None:
    """None where the template refuses."""
    try:
        return compiled.render(messages, tools)
    except RequestValidationError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("family", TEMPLATES)
def test_prompts_equal_transformers(peer: Peer, family: str) -> None:
    """Every conversation, with tools and without, gives the same prompt, or is refused by both."""
    compiled, prompts = template(TEMPLATES[family]), set()
    for name, messages in CONVERSATIONS.items():
        for tools in ([], TOOLS):
            seen = shown(messages, tools)
            prompt = attempt(compiled, messages, tools)
            assert prompt == peer(TEMPLATES[family], seen["messages"], seen["tools"]), name
            prompts.add(prompt)
    assert len(prompts - {None}) >= 5, "this family refuses nearly everything: it shows nothing"


def test_what_is_refused() -> None:
    """raise_exception refuses, with its message, the conversations that a family does not take."""
    for family, name, complaint in [
        ("gemma", "system", "System role not supported"),
        ("gemma", "two users", "must alternate"),
        ("mistral", "two users", "roles must alternate"),
        ("llama-2", "begins with the assistant", "Roles must go"),
        ("llama-3", "two calls", "One call at a time"),
    ]:
        with pytest.raises(RequestValidationError, match=rf"^prompt: the model's chat template refuses .*{complaint}"):
            render(TEMPLATES[family], CONVERSATIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{{ tojson }}{{ 'x' | tojson(False, 2) }}{{ [1, 'ä'] | tojson(ensure_ascii=True, separators=('-', '+')) }}",
        "{{ [1] | map('string') | tojson }}",
        "{{ {1: 2} | tojson }}{{ namespace() | tojson }}",
        "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{{ dict.fromkeys('ab', 1) }}{{ dict([('a', 1)], b=2) }}{{ dict.mro }}{{ dict.__class__ }}",
        "{{ namespace({'a': 1}, self=2).self }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].no_such_key }}{{ messages[9] }}{{ none_such.a }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% extends 'x' %}",
        "{% do messages %}",
        "{{ _('x') }}",
        "{{ undefined | upper }}{{ undefined | length }}{{ undefined in [1] }}{{ 1 in undefined }}",
        "{% autoescape true %}{{ '<' }}{{ messages[0].role ~ '&' }}{{ messages[0].role | safe ~ '<' }}{% endautoescape %}",
        "{{ '<'|e + '<' }}{{ ('%s'|safe) % '<' }}{{ ('{}'|safe).format('<') }}{{ ','|safe|join }}",
        "{{ (','|safe).join(['<', '>']) }}{{ {'a': 1} | xmlattr }}{{ [1, 1] | unique | list }}{{ 1.55 | round(1) }}",
        "{{ [[1, 2], [3]] | sum(start=[]) }}{{ [3, 1] | sort(reverse=true) }}{{ ['b', 'A'] | sort }}",
        "{{ 'a b' | wordwrap(1) }}{{ '<b>x</b>' | striptags }}{{ 'http://a.b' | urlize }}{{ [1] | pprint }}",
        "{{ 'a\nb' | indent(2, true) }}{{ 'a\nb' | indent('> ') }}{{ 'abcd' | truncate(3, true, '', 0) }}",
        "{{ range(7) | slice(3) | list }}{{ range(5) | batch(2, 'x') | list }}{{ 'abc' | list }}{{ 'abc' | reverse }}",
        "{{ 'a.b.c'.rpartition('.') }}{{ 'aXb'.split('X', maxsplit=1) }}{{ 'a b'.rsplit(none, 1) }}{{ 'xax'.strip('x') }}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner() %}{{ j() }}{{ j() }}",
        "{% for a, b in {'x': 1, 'y': 2}.items() if b > 1 %}{{ a }}{{ loop.length }}{% else %}none{% endfor %}",
        "{% set a, b = 1, 2 %}{{ (a, b) }}{{ [a, [b]] }}{{ {'a': a, b: 'b'} }}{{ a is eq(1) }}{{ a is in([1]) }}",
    ],
)
def test_corners_equal_transformers(peer: Peer, source: str) -> None:
    """What templates can say beyond the families' habits means the same, or is refused by both."""
    messages = [user("a"), assistant("b")]
    try:
        prompt = attempt(template(source), messages, [])
    except TokenizerError:
        prompt = None
    assert prompt == peer(source, shown(messages)["messages"], None)


# -- hostile templates ----------------------------------------------------------------------------------------------------

LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}"
END = "{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x=X) %}{% for i in range(99) %}{% set ns.x = DOUBLE %}{% endfor %}"
BIG = "{% set big = 'a' * 4000000 %}"


def doubling(start: str, double: str, then: str = "{{ ns.x }}") -> str:
    return DOUBLED.replace("X", start, 1).replace("DOUBLE", double) + then


HOSTILE = {
    "loops in loops": f"{LOOP}{{% if a == 0.5 %}}x{{% endif %}}{END}",
    "loops that select nothing": f"{LOOP[:-3]} if b{'.real' * 20} < 0 %}}x{END}",
    "loops with output": f"{LOOP}x{{{{ a }}}}{END}",
    "loops with text": f"{LOOP}{'x' * 50_000}{END}",
    "loops in a set block": f"{{% set x %}}{LOOP}{'x' * 50_000}{END}{{% endset %}}",
    "loops in a filter block": f"{{% filter upper %}}{LOOP}{'x' * 50_000}{END}{{% endfilter %}}",
    "loops over a namespace": f"{{% set ns = namespace(x=0) %}}{LOOP}{{% set ns.x = ns.x + 1 %}}{END}{{{{ ns.x }}}}",
    "loops with much between": f"{LOOP}{'{% if a %}{% if b %}{{ a == b }}{% endif %}{% endif %}' * 1000}{END}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "recursive loop that doubles": "{% set d=namespace(n=0) %}{% for a in [25] recursive %}"
    "{% if a > 0 %}{{ loop([a - 1, a - 1]) }}{% endif %}{% endfor %}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros by turns": "{% macro a(f) %}{{ f(f) }}{% endmacro %}{{ a(a) }}",
    "block without end": "{% block b %}{{ self.b() }}{% endblock %}",
    "call block without end": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "times": "{{ 'x' * 10**10 }}",
    "times a list": "{{ ([0] * 10**9) | length }}",
    "times a list of lists": "{% set a = [0] * 100000 %}{{ [a] * 100000 }}",
    "times the other way": "{{ 10**10 * 'x' }}",
    "power": "{{ 2 ** 1000000000 }}",
    "powers of powers": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x ** 2 %}{% endfor %}",
    "products": doubling("3", "ns.x * ns.x", ""),
    "numbers from text": "{{ ('f' * 4000000) | int(0, 16) }}",
    "rounding": "{{ 5 | round(-10**9) }}",
    "printf width": "{{ '%1000000000d' % 1 }}",
    "printf width behind a key": "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "printf width given": "{{ '%*d' % (10**9, 1) }}",
    "printf precision": "{{ '%.1000000000f' % 1 }}",
    "printf filter": "{{ '%1000000000d' | format(1) }}",
    "printf with repeats": BIG + "{{ ('%(a)s' * 100000) % {'a': big} }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format width given": "{{ '{:{}}'.format(1, 10**9) }}",
    "format width in two parts": "{{ '{:{}00000000}'.format(1, 99) }}",
    "format with repeats": BIG + "{{ ('{0}' * 100000).format(big) }}",
    "format by map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format by attr": "{{ ('{:1000000000}' | attr('format'))(1) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "center in a constant": "{% set x = 'x' | center(1000000000) %}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000000) }}",
    "indent by text": BIG + "{{ ('x\n' * 1000000) | indent(big) }}",
    "json indent": "{{ ([[1]] * 100000) | tojson(indent=1000000) }}",
    "json separators": BIG + "{{ ([1] * 100000) | tojson(separators=(big, big)) }}",
    "concatenation": doubling("'ab'", "ns.x ~ ns.x"),
    "concatenation of many": BIG + "{{ " + " ~ ".join(["big"] * 1000) + " }}",
    "concatenation with something wide": doubling("'ab'", "ns.x ~ ns.x", "").replace(
        "{% endfor %}", "{% if i > 19 %}{% set ns.y = ns.x ~ '\U0001f642' %}{% endif %}{% endfor %}"
    ),
    "output with something wide": f"\U0001f642{BIG}{{% for i in range(99) %}}{{{{ big }}}}{{% endfor %}}",
    "addition of texts": doubling("'ab'", "ns.x + ns.x"),
    "addition of lists": doubling("[1]", "ns.x + ns.x"),
    "list times list": "{{ [1] * [2] }}",
    "lists in lists, shown": doubling("[1]", "[ns.x, ns.x]"),
    "lists in lists, compared": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x == ns.x[0] }}"),
    "lists in lists as JSON": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
    "dicts in dicts": doubling("1", "{'a': ns.x, 'b': ns.x}"),
    "dicts made by dict": doubling("1", "dict(a=ns.x, b=ns.x)"),
    "lists made of arguments": "{% macro m(ns) %}{% set ns.y = varargs %}{% endmacro %}{% set ns = namespace(y=1) %}"
    "{% for i in range(99) %}{{ m(ns, ns.y, ns.y) }}{% endfor %}{{ ns.y }}",
    "lists made by filters": doubling("[[1]]", "(ns.x + ns.x) | batch(2) | list"),
    "tuples too deep to be hashed": "{% set ns = namespace(x=()) %}{% for i in range(2000) %}{% set ns.x = (ns.x,) %}"
    "{% endfor %}{{ {}[ns.x] }}",
    "tuples in tuples, hashed": doubling("()", "(ns.x, ns.x)", "{{ {}[ns.x] }}"),
    "copies kept": BIG + "".join(f"{{% set a{i} = big[1:] %}}" for i in range(1000)),
    "lists kept": "{% set a = [0] * 100000 %}" + "".join(f"{{% set a{i} = a[:] %}}" for i in range(2000)),
    "join": BIG + "{{ ([big] * 100000) | join(big) }}",
    "join by a method": BIG + "{{ big.join(range(100000) | map('string')) }}",
    "replace": BIG + "{{ big | replace('a', big) }}",
    "replace by a method": BIG + "{{ big.replace('', big) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "range": "{{ range(10**9) | list }}",
    "split": BIG + f"{LOOP}{{{{ big.split('a') | length }}}}{END}",
    "search": BIG + f"{LOOP}{{{{ 'b' in big }}}}{END}",
    "search from the right": BIG + "{{ big.rfind('b' + big[:2000000]) }}",
    "strip": BIG + "{{ big.strip('b' * 4000000 + 'a') }}",
    "wordwrap": BIG + "{{ big | wordwrap(1) }}",
    "striptags": "{{ ('<!---->' * 1000000) | striptags }}",
    "urlize": BIG + "{{ big | urlize }}",
    "sum of lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) }}",
    "sort": "{% for i in range(1000) %}{{ range(100000) | sort(attribute='real') | length }}{% endfor %}",
    "selection": "{% for i in range(1000) %}{{ range(100000) | select('odd') | list | length }}{% endfor %}",
    "selection of nothing": "{% for i in range(1000) %}{{ range(100000) | reject('number') | list }}{% endfor %}",
    "paths of attributes": "{{ range(100000) | map(attribute='real.' * 10000 ~ 'real') | list }}",
    "paths of attributes, one by one": "{{ range(100000) | map('int') | selectattr('real.' * 50000 ~ 'real') | list }}",
    "many attributes": "{{ range(100000) | sort(attribute='real,' * 10000 ~ 'real') }}",
    "paths in a format": "{{ ('{0.real' ~ '.real' * 2000000 ~ '}').format(1) }}",
    "count": "{% for i in range(100000) %}{{ range(100000).count('x') }}{% endfor %}",
    "equal hashes": "{{ range(0, 100000 * (2**61 - 1), 2**61 - 1) | unique | list }}",
    "keys of equal hashes": "{{ dict.fromkeys(range(0, 100000 * (2**61 - 1), 2**61 - 1)) }}",
    "time": "{{ strftime_now('%c' * 1000000) }}",
    "budget from outside": "{% for i in range(9) %}{{ [0 - 10**12] | map('ferrum pay') | list }}{% endfor %}"
    "{{ ('x' * 10**8) | length }}",
    "include": "{% include 'x' %}",
    "include what is not there": "{% include ['x', 'y'] ignore missing %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends messages[0].content %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by attr": "{{ (''|attr('__class__')).mro() }}",
    "class by item": "{{ ''['__class__']['mro']() }}",
    "class by map": "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | first | list | first | list }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "bytes": "{{ (1).to_bytes(10**9) }}",
    "bytes of text": "{{ 'a'.encode().hex() }}",
    "translation": "{{ 'a'.translate({97: 'b' * 10}) }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    """The request fails within a second of the thread's time, and the next one is served."""
    hostile = template(HOSTILE[name])
    start = time.thread_time()
    with pytest.raises(RequestValidationError, match=r"^prompt: the model's chat template"):
        hostile.render([user("Hi")])
    assert time.thread_time() - start < seconds_here(1)
    assert render(TEMPLATES["zephyr"]) == "<|user|>\nHi</s>\n<|assistant|>\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, source in HOSTILE.items() if "big" in source or "ns.x" in source])
def test_memory_of_the_hostile(name: str) -> None:
    """Until it fails, a render takes less than 200 MB."""
    hostile = template(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(RequestValidationError):
            hostile.render([user("Hi")])
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_hostile_and_good_at_once() -> None:
    """Threads share templates, but not budgets: beside renders that are stopped, others are served."""
    good, hostile = template(TEMPLATES["qwen"]), template(HOSTILE["loops over a namespace"])
    expected = good.render(CONVERSATIONS["tool result"], TOOLS)

    def stopped(_: int) -> str:
        with pytest.raises(RequestValidationError, match="stopped"):
            hostile.render([user("Hi")])
        return expected

    with ThreadPoolExecutor(4) as threads:
        both = [threads.submit(stopped, number) for number in range(2)]
        both += [threads.submit(good.render, CONVERSATIONS["tool result"], TOOLS) for _ in range(200)]
        assert [each.result() for each in both] == [expected] * 202


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in TEMPLATES if family != "json"])
def test_long_conversations_pass(family: str) -> None:
    """A hundred turns with a megabyte of text, half of it not ASCII, and fifty tools are well within the budget."""
    turns = [
        user("Ein größerer Satz. " * 540) if turn % 2 == 0 else assistant("A plain line.\n" * 720) for turn in range(99)
    ]
    assert sum(len(turn.content) for turn in turns) > 1_000_000
    tools = [tool(f"f{number}", "d" * 200, **TOOLS[0].function.parameters) for number in range(50)]
    assert render(TEMPLATES[family], turns, tools)


@pytest.mark.parametrize("name", ["macro without end", "macros by turns", "block without end", "recursive loop"])
def test_depth(name: str) -> None:
    """Calls in calls end long before Python's stack, whose limit is the host's to set."""
    with pytest.raises(RequestValidationError, match="stopped: it nests calls more than 100 deep"):
        render(HOSTILE[name])


def test_complaints_are_cut() -> None:
    """What a template complains of can be as long as a prompt; its first thousand characters are passed on."""
    with pytest.raises(RequestValidationError) as raised:
        render("{{ raise_exception('" + "x" * 100_000 + "') }}")
    assert 1000 < len(str(raised.value)) < 1100


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no ' + messages[0].content) }}",
        "{{ {}[messages[0].content].x }}",
        "{{ messages[0].content.x() }}",
    ],
)
def test_complaints_quote_no_message(source: str) -> None:
    """What a template puts together, or Python makes of what it is given, is told by its class alone, and is no cause."""
    with pytest.raises(RequestValidationError, match=r"the model's chat template \w+ these messages: \w+Error$") as raised:
        render(source, [user("something private")])
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
