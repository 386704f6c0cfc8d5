"""Definitions that try to take a compiler's time, memory or stack. Most are of the largest size that is let through."""

import json
from typing import Any, Literal

from hypothesis import strategies as st

from tests.json_schemas import json_schemas

Definition = tuple[Literal["json_schema", "regex", "grammar"], Any]


def _object(properties: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties or {}} | more


def _definitions(last: dict[str, Any], definitions: list[dict[str, Any]]) -> dict[str, Any]:
    """Each refers to the next as ``#/$defs/{its number plus 1}``; the first is the root."""
    named = {str(index): definition for index, definition in enumerate([*definitions, last])}
    return {"$defs": named, "$ref": "#/$defs/0"}


def _ref(index: int) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{index}"}


def _nested(opening: str, inside: str, closing: str, depth: int) -> str:
    return opening * depth + inside + closing * depth


def _rules(count: int, body: str, last: str) -> str:
    """``start`` is the first; in ``body``, N stands for the next."""
    rules = [
        f"{name}: {body.replace('N', f'r{index}')}" for index, name in enumerate(["start", *(f"r{i}" for i in range(count))])
    ]
    return "\n".join([*rules, f"r{count}: {last}"])


def _terminals(count: int, body: str, last: str) -> str:
    rules = [f"T{index}: {body.replace('N', f'T{index + 1}')}" for index in range(count)]
    return "\n".join(["start: T0", *rules, f"T{count}: {last}"])


_HASHES = [f"{index * 2654435761 % 2**32:x}" for index in range(5_000)]

_REGEXES = {
    "nested repeats": "((a|aa)+){1,1000}",
    "nested counts": "((a|aa){1,1000}){1,1000}",
    "four nested counts": "(((a{1,100}){1,100}){1,100}){1,100}",
    "overlapping counts": "((a{0,100}b{0,100}){0,100}c{0,100}){0,100}",
    "ambiguous plus": "(x+x+)+y",
    "a count of a hundred thousand": "a{1,100000}",
    "a forced million": "a{1000000}",
    "a forced four billion": "a{4000000000}",
    "a forced product": "(a{1000}){1000}",
    "exponential automaton": "(a|b)*a(a|b){20}",
    "huge exponential automaton": ".*a.{10000}",
    "dots before an a": "(.{0,500}a){0,500}",
    "many stars": ".*x" * 2_700,
    "starred stars": "(a*)*" * 1_600,
    "optional letters": "a?" * 2_700 + "a" * 2_700,
    "optional groups": "(a?b?c?)" * 1_000,
    "many words": "|".join(_HASHES[:900]),
    "words anywhere": "|".join(f".*{word}" for word in _HASHES[:700]),
    "unicode classes": r"\p{L}" * 1_600,
    "unicode words, any case": "(?i)" + r"\w" * 4_000,
    "unicode count": r"(\p{L}|\p{N}){1,5000}",
    "class differences": r"[\p{L}--\p{Lu}]" * 500,
    "classes repeated": "|".join(f"[{chr(97 + index % 26)}-z]{{{index}}}" for index in range(1, 300)),
    "lengths without a common divisor": "|".join(f"(.{{{prime}}})*x" for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)),
    "long text": "a" * 8_000,
    "too long": "a" * 1_000_000,
    "nested groups": _nested("(", "a", ")", 60),
    "groups too deep": _nested("(", "a", ")*", 3_000),
    "brackets too deep": _nested("[", "a", "]", 3_000),
}

_SCHEMAS: dict[str, Any] = {
    "1,000 properties": _object({f"p{index}": {"type": "string"} for index in range(1_000)}),
    "1,000 lengths": _object({f"p{index}": {"type": "string", "maxLength": 1_000 + index} for index in range(1_000)}),
    "2,000 untyped": _object({f"p{i}": _object({f"q{j}": {"minLength": 1} for j in range(50)}) for i in range(40)}),
    "required only": _object(required=[f"p{index}" for index in range(5_000)]),
    "huge enum": {"enum": [f"v{index}" for index in range(6_000)]},
    "enum of objects": {"enum": [{"a": {"b": [index]}} for index in range(1_000)]},
    "enum of too many objects": {"enum": [{}] * 9_000},
    "long constant": {"const": [0] * 9_000},
    "many prefix items": {"type": "array", "prefixItems": [{}] * 9_000},
    "big minItems": {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000},
    "big maxItems": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
    "nested maxItems": json.loads(_nested('{"type":"array","maxItems":1000,"items":', "{}", "}", 8)),
    "big minLength": {"type": "string", "minLength": 10**6},
    "big maxLength": {"type": "string", "maxLength": 10**9},
    "length beyond 64 bits": {"type": "string", "maxLength": 2**70},
    "numbers beyond 64 bits": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "numbers of 5,000 digits": {"type": "integer", "minimum": 10**5_000},
    "tiny numbers": {"type": "number", "minimum": 5e-324, "maximum": 1e-320},
    "large multiple": {"type": "integer", "multipleOf": 9_973},
    "huge multiple": {"type": "integer", "multipleOf": 99_999_989},
    "huge fraction": {"type": "number", "multipleOf": 0.1 + 0.2},
    "many multiples": _object({f"p{index}": {"type": "integer", "multipleOf": 9_000 + index} for index in range(100)}),
    "common multiple": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (997, 991, 983)]},
    "exponential pattern": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"},
    "huge pattern": {"type": "string", "pattern": "a.{1000}$"},
    "long pattern": {"type": "string", "pattern": "^" + "a?" * 2_000 + "a" * 2_000},
    "patterns together": {"allOf": [{"type": "string", "pattern": f"a.{{{index}}}b"} for index in range(30)]},
    "8 patterns together": {"allOf": [{"type": "string", "pattern": f"a.{{{index}}}b"} for index in range(8)]},
    "300 patterns": _object({f"p{i}": {"type": "string", "pattern": f"a.*{i}.*b", "maxLength": 20} for i in range(300)}),
    "300 formats": _object({f"p{i}": {"type": "string", "format": ("uri", "email", "ipv6")[i % 3]} for i in range(300)}),
    "30 property patterns": _object(patternProperties={f"^{index:02d}(a|b)*a(a|b){{8}}$": {} for index in range(30)}),
    "1,000 property patterns": _object(patternProperties={f"^{index}x$": {} for index in range(1_000)}),
    "property patterns again and again": {
        "allOf": [_object(patternProperties={f"^{index}(a|b)*a(a|b){{8}}$": {} for index in range(9)})] + [_object()] * 100
    },
    "many other names": _object({word: {} for word in _HASHES[:1_000]}, additionalProperties={"type": "integer"}),
    "additional pattern": {"type": "object", "additionalProperties": {"type": "string", "pattern": "a.{15}b.{15}$"}},
    "minProperties of 64": _object({f"p{i}": {} for i in range(64)}, minProperties=1, additionalProperties=False),
    "minProperties of 300": _object({f"p{i}": {} for i in range(300)}, minProperties=1, additionalProperties=False),
    "minProperties from beside": {
        "allOf": [_object({f"p{i}_{j}": {} for j in range(50)}) for i in range(10)]
        + [{"type": "object", "minProperties": 1}]
    },
    "a cycle of $ref": {"$defs": {"a": _ref(0) | {"title": "b"}, "0": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "a cycle beside constraints": _definitions(_ref(0) | {"type": "object"}, [_ref(1) | {"type": "object"}]),
    "a tree": _definitions({}, [_object({"children": {"type": "array", "items": _ref(0)}})]),
    "mutual recursion": _definitions(
        {}, [{"anyOf": [{"type": "array", "items": _ref((i * 7 + j) % 80)} for j in range(5)]} for i in range(80)]
    ),
    "a billion laughs (allOf)": _definitions({"type": "string"}, [{"allOf": [_ref(i + 1)] * 10} for i in range(10)]),
    "a billion laughs (anyOf)": _definitions({"type": "string"}, [{"anyOf": [_ref(i + 1)] * 10} for i in range(10)]),
    "a billion laughs (oneOf)": _definitions({"type": "string"}, [{"oneOf": [_ref(i + 1)] * 10} for i in range(10)]),
    "a billion laughs (types)": _definitions(
        {"type": "string"},
        [{"anyOf": [_ref(i + 1) | {"type": ["string", kind]} for kind in ("integer", "null")]} for i in range(25)],
    ),
    "a billion laughs (properties)": _definitions(
        _object(), [_object({f"p{j}": _ref(i + 1) | {"type": "object"} for j in range(10)}) for i in range(8)]
    ),
    "a product of anyOf": {"allOf": [{"anyOf": [_object({f"a{i}": {"const": j}}) for j in range(4)]} for i in range(20)]},
    "1,000 alternatives": {"anyOf": [_object({"k": {"const": f"{i}"}}, required=["k"]) for i in range(800)]},
    "1,000 exclusive alternatives": {"oneOf": [_object({"k": {"const": f"{i}"}}, required=["k"]) for i in range(800)]},
    "a chain of $ref": _definitions({"type": "null"}, [_ref(index + 1) for index in range(254)]),
    "a chain of $ref too long": _definitions({"type": "null"}, [_ref(index + 1) for index in range(900)]),
    "a chain of arrays": _definitions({}, [{"type": "array", "items": _ref(index + 1)} for index in range(127)]),
    "a chain of arrays too deep": _definitions({}, [{"type": "array", "items": _ref(i + 1)} for i in range(200)]),
    "62 deep": _nested('{"items":', "{}", "}", 62),
    "10,000 deep": _nested('{"items":', "{}", "}", 10_000),
    "100,000 deep": "[" * 100_000,
    "a megabyte": {"description": "x" * 1_000_000},
}

_GRAMMARS = {
    "ambiguous": 'start: e\ne: e e | "a"',
    "very ambiguous": 'start: e\ne: e e e | e e | "a" | "aa" | ""',
    "mutual left recursion": 'start: a\na: b\nb: a | "x"',
    "nullable": 'start: a a a a a a a a\na: b b b b b b b b\nb: c c c c c c c c\nc: "x"?',
    "doubled rules": _rules(40, "N N", '"y"'),
    "doubled optional rules": _rules(40, "N N | N", '"y"?'),
    "doubled terminals": _terminals(30, "N N", '"y"'),
    "nested groups": "start: " + _nested("(", '"a"', ")*", 25),
    "groups too deep": "start: " + _nested("(", '"a"', ")", 1_000),
    "nested counts": 'start: (("a"|b){1,1000}){1,1000}\nb: "b" "c"',
    "a count of two billion": 'start: ("a"|b){2000000000}\nb: "b" "c"',
    "a terminal of a million": 'start: A\nA: ("a"|"b"){1000000}',
    "a chain of rules": _rules(280, 'N "x"', '"y"'),
    "a chain of rules too long": _rules(1_500, "N", '"y"'),
    "a chain of terminals": _terminals(280, 'N "x"', '"y"'),
    "a chain of terminals too long": _terminals(1_500, "N", '"y"'),
    "terminals together": "start: A\nA: " + " & ".join(f"/.*{letter}.*/" for letter in "abcdefghijklmnopqrst"),
    "a negated terminal": "start: A\nA: ~(/.*a.{20}/) & /(.|b)*/",
    "optional terminals": 'start: A\nA: /a?/ "a" ' + '"a"? ' * 2_500,
    "starred terminals in a row": "start: " + " ".join(f"(/[a-z]{index}/)*" for index in range(290)),
    "300 rules in a row": "start: " + "(a)* " * 300 + "\na: /[a-z]/",
    "overlapping terminals": "start: c*\nc: /./ | /a/ | /[a-z]/ | /a+/ | "
    + " | ".join(f"/[a-z]*{i}[a-z]*/" for i in range(250)),
    "1,000 alternatives": "start: (" + "|".join(f"/{index}+/" for index in range(1_000)) + ")*",
    "lazy": "start: a+\na[lazy]: /.*a.{10}/",
    "suffix": "start: a\na[suffix=/y.{0,500}z/]: /.*/",
    "ignored": '%ignore /.*a.{20}/\nstart: "x" "y"',
    "parameters": 'start: p::0\np::_: "a" p::incr(_) | "b" %if bit_count_ge(_, 10)',
    "permutations": "start: p::0\np::_: %if is_ones([0:20])\n"
    + "\n".join(f' | "{chr(97 + index)}" p::set_bit({index}) %if bit_clear({index})' for index in range(20)),
    "deep conditions": 'start: p::0\np::_: "a" p::incr(_) %if ' + _nested("not(", "true", ")", 1_000),
    "deep templates": "start: " + _nested("a{", "x", "}", 1_000),
    "deep grammars": "start: " + _nested("%lark { start: ", '"a"', " }", 100),
    "substrings": 'start: %regex {"substring_chars": "' + "abcd" * 3_900 + '"}',
    "deep JSON": "start: %json " + "[" * 10_000,
    "deep JSON in a regex": "start: %regex " + "[" * 10_000,
    "a chain of $ref": "start: %json " + json.dumps(_definitions({}, [_ref(index + 1) for index in range(300)])),
    "many schemas": "start: " + " | ".join(["%json {}"] * 1_400),
    "hidden in a string": 'start: "' + "%json [" * 1_000 + '"',
    "a long regex": "start: /" + "a?" * 7_000 + "/",
    "regexes that are long together": "start: " + " ".join(["/" + "a?" * 2_000 + "/"] * 3),
    "too long": 'start: "' + "a" * 1_000_000 + '"',
}

HOSTILE: dict[str, Definition] = {
    **{f"regex: {name}": ("regex", text) for name, text in _REGEXES.items()},
    **{f"schema: {name}": ("json_schema", schema) for name, schema in _SCHEMAS.items()},
    **{f"grammar: {name}": ("grammar", text) for name, text in _GRAMMARS.items()},
}

REFUSED = {
    *("regex: too long", "regex: groups too deep", "regex: brackets too deep"),
    *("schema: required only", "schema: enum of too many objects", "schema: long constant", "schema: many prefix items"),
    *("schema: huge multiple", "schema: huge fraction", "schema: many multiples", "schema: common multiple"),
    *("schema: patterns together", "schema: 1,000 property patterns", "schema: property patterns again and again"),
    *("schema: minProperties of 300", "schema: minProperties from beside", "schema: a cycle beside constraints"),
    *("schema: a billion laughs (allOf)", "schema: a billion laughs (types)", "schema: a billion laughs (properties)"),
    *("schema: a product of anyOf", "schema: a chain of $ref too long", "schema: a chain of arrays too deep"),
    *("schema: 10,000 deep", "schema: 100,000 deep", "schema: a megabyte"),
    *("grammar: groups too deep", "grammar: a chain of rules too long", "grammar: a chain of terminals too long"),
    *("grammar: deep conditions", "grammar: deep templates", "grammar: deep JSON", "grammar: deep JSON in a regex"),
    *("grammar: a chain of $ref", "grammar: a long regex", "grammar: regexes that are long together", "grammar: too long"),
}
"""Those that llguidance must not see at all."""

_REGEX_PIECES = (
    *("a", "b", ".", "(", ")", "[", "]", "{", "}", "|", "*", "+", "?", "^", "$", "-", "/", " ", "é", "\n", "\x00", "\\"),
    *(".*", "{1,1000}", "{20}", "(a|aa)+", r"\p{L}", r"\W", r"\b", "(?i)", "[^a]", "(?:", ")*"),
)
_LARK_PIECES = (
    *('"a"', '"b"i', "/.*/", "/a{3,}/", "x", "y", "X", "Y", "|", "(", ")", "[", "]", "*", "+", "?", "{2,9}", "~3", "&", "~"),
    *("->", ":", "%", "\nx: ", "\ny: ", "\nX: ", "\nY: ", "%json {}", '%json {"type":', "%lark {", "}", "%ignore", "#"),
    *("%import common.INT", '%regex {"substring_words": "a b"}', "%llguidance {}", "::_", "%if", '"\\u0000"', "é"),
    *("<|eos|>", "<[5]>", "@x", "[max_tokens=2]", "[stop=/b/]", "//", "/"),
)
_KEYWORDS = (
    *("type", "properties", "items", "prefixItems", "anyOf", "allOf", "oneOf", "$ref", "$defs", "enum", "const", "required"),
    *(
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minItems",
        "maxItems",
        "minProperties",
        "maximum",
        "multipleOf",
        "$id",
    ),
    *("additionalProperties", "patternProperties", "x-guidance", "minimum", "exclusiveMaximum", "id", "$schema", "not", "a"),
)
_VALUES = (
    *(None, True, False, 0, -1, 0.5, 1e300, 10**30, "string", "object", "array", "integer", "number"),
    *("#", "#/items", "#/%", "a.*b", "(", "uuid", "", "http://json-schema.org/draft-04/schema#"),
)


def random_definitions() -> st.SearchStrategy[Definition]:
    """Pieces of definitions, put together at random, and sound ones among them."""
    keywords = st.sampled_from(_KEYWORDS)
    values = st.recursive(
        st.sampled_from(_VALUES),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords, inner, max_size=4),
        max_leaves=12,
    )
    return st.one_of(
        st.lists(st.sampled_from(_REGEX_PIECES), max_size=12).map(lambda pieces: ("regex", "".join(pieces))),
        st.lists(st.sampled_from(_LARK_PIECES), max_size=14).map(lambda pieces: ("grammar", "start: " + " ".join(pieces))),
        st.dictionaries(keywords, values, max_size=5).map(lambda schema: ("json_schema", schema)),
        json_schemas().map(lambda schema: ("json_schema", json.dumps(schema))),
        st.text(max_size=20).map(lambda text: ("json_schema", text)),
    )
