"""What a response_format may be, before llguidance sees it.

llguidance bounds most of its work by fuel (see ``grammar.LIMITS``). What it does not bound is refused here, on the text
alone: recursion as deep as the definition wants (the end of the stack is the end of the process), schemas whose
intersections grow exponentially, and automata for multiples, for patterns that must hold together and for patterns of
property names, which are built before any fuel is counted. Nothing here recurses on what has not been found shallow.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from ferrum_rt.interfaces.errors import RequestValidationError

# Large enough for the schemas and grammars of real programs. A regular expression costs up to the square of its length,
# hence the lower bound there, which holds for all that stand in a schema or a grammar together.
MAX_SCHEMA_BYTES = 64 * 1024
MAX_GRAMMAR_BYTES = 16 * 1024
MAX_REGEX_BYTES = 8 * 1024
MAX_NESTING = 64
# Levels of one schema inside another, followed through $ref. Each takes up to 5 KiB of a stack of 8 MiB.
MAX_SCHEMA_LEVELS = 256
# The same for rules of a grammar that name one another: definitions and brackets together.
MAX_GRAMMAR_LEVELS = 600
MAX_NODES = 20_000
MAX_REFS = 256
MAX_MEMBERS = 1_000
# With minProperties or maxProperties, an object is written out once for each of its properties.
MAX_COUNTED_PROPERTIES = 64
# Parts of a schema after all intersections.
MAX_EXPANDED = 200_000
MAX_PATTERNS = 512
MAX_PATTERNS_TOGETHER = 8
# States of the automata that count remainders.
MAX_MULTIPLES = 10_000

JSON_OPTIONS = {"whitespace_pattern": r" {1,2}|\n[ \t]{0,32}", "json_allowed_escapes": 'nrbtf\\"'}
"""What llguidance takes as ``x-guidance`` of a schema. Whitespace is bounded, because a model at temperature 1 can choose it
for ever. No \\u: an additional property could be given the name of another with it, and so get round that one's schema."""

# What llguidance does not count among the constraints.
_ANNOTATIONS = {"$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default"}
_ANNOTATIONS |= {"definitions", "description", "examples", "id", "readOnly", "title", "writeOnly", "x-guidance"}
_IN_PLACE = ("$ref", "allOf", "anyOf", "oneOf", "const", "enum")
_MAPS = ("properties", "patternProperties")
_LISTS = ("prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")

Schema = dict[str, Any]

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[][{}]', re.DOTALL)
_REGEX_TOKEN = re.compile(r"\\.|[][()]", re.DOTALL)
# In the order of llguidance's lexer: what is inside strings, regular expressions and comments is no grammar.
_LARK_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\x00-\x1f\x7f])*"|/(?:\\.|[^/\\])+/|(?:\#|//)[^\n]*|%(?:json|regex|llguidance)\b|[][(){}:~]', re.DOTALL
)


def refuse(why: str) -> NoReturn:
    raise RequestValidationError(f"response_format: {why}") from None


def check_size(text: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        refuse(f"the definition is not valid Unicode: {error.reason} at position {error.start}")
    if size > limit:
        refuse(f"the definition has {size} bytes; at most {limit} are taken")


def read_schema(definition: str | dict[str, Any]) -> Schema:
    """The schema, safe to be walked, to be written as JSON and to be compiled."""
    if isinstance(definition, str):
        check_size(definition, MAX_SCHEMA_BYTES)
        _check_nesting(token[0] for token in _JSON_TOKEN.findall(definition))
        try:
            definition = json.loads(definition)
        except ValueError as error:
            refuse(f"the schema is not valid JSON: {error}")
    if not isinstance(definition, dict):
        refuse("the schema must be a JSON object")
    _check_values(definition)
    try:
        check_size(json.dumps(definition, allow_nan=False, ensure_ascii=False), MAX_SCHEMA_BYTES)
    except (TypeError, ValueError) as error:
        refuse(f"the schema cannot be written as JSON: {error}")
    _SchemaCheck(definition).run()
    return definition


def check_regex(text: str) -> None:
    check_size(text, MAX_REGEX_BYTES)
    _check_nesting(token for token in _REGEX_TOKEN.findall(text) if len(token) == 1)


def read_lark(text: str) -> str:
    """The grammar, checked, and with bounded whitespace in the JSON schemas that stand in it."""
    check_size(text, MAX_GRAMMAR_BYTES)
    pieces, regexes, position, levels, brackets = list[str](), list[str](), 0, 0, list[str]()
    while token := _LARK_TOKEN.search(text, position):
        found, end = token[0], token.end()
        pieces.append(text[position:end])
        if found.startswith("/") and not found.startswith("//"):
            check_regex(found)
            regexes.append(found)
        elif found[0] == "%":
            value, end = _json_at(text, end)
            if found == "%json" and isinstance(value, dict):
                value = {"x-guidance": JSON_OPTIONS} | read_schema(value)
            pieces.append(" " + json.dumps(value))
        elif found in "[](){}:~":
            levels += 2 if found in ":~" else 1
            brackets.append(found)
        position = end
    if levels > 2 * MAX_GRAMMAR_LEVELS:
        refuse(f"the grammar is too complex: more than {MAX_GRAMMAR_LEVELS} definitions and groups")
    check_size("".join(regexes), MAX_REGEX_BYTES)
    _check_nesting(bracket for bracket in brackets if bracket not in ":~")
    return "".join(pieces) + text[position:]


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends."""
    _check_nesting((token[0] for token in _JSON_TOKEN.finditer(text, start)), until_closed=True)
    while text[start : start + 1] in (" ", "\t", "\r", "\n"):
        start += 1
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except ValueError as error:
        refuse(f"the grammar has invalid JSON in it: {error}")


def _check_nesting(tokens: Iterator[str] | list[str], *, until_closed: bool = False) -> None:
    depth = 0
    for token in tokens:
        if token in "[{(":
            depth += 1
            if depth > MAX_NESTING:
                refuse(f"the definition is nested more than {MAX_NESTING} deep")
        elif token in "]})":
            depth = max(depth - 1, 0)
            if until_closed and depth == 0:
                return


def _check_values(root: Schema) -> None:
    """``root`` may hold anything, itself included."""
    left: list[tuple[Any, int]] = [(root, 0)]
    num_nodes = 0
    while left:
        value, depth = left.pop()
        num_nodes += 1
        if num_nodes > MAX_NODES:
            refuse(f"the schema is too large: more than {MAX_NODES} values")
        if depth > MAX_NESTING:
            refuse(f"the definition is nested more than {MAX_NESTING} deep")
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                refuse("the schema has a key that is not a string")
            for key, child in value.items():
                # The members of an enum are written out one beside the other; all other collections are nested.
                members = child if isinstance(child, dict | list) else ()
                if key == "enum" and isinstance(child, list):
                    members = [member for member in child if isinstance(member, dict | list)]
                if len(members) > MAX_MEMBERS:
                    refuse(f"{key[:100]!r} in the schema has more than {MAX_MEMBERS} members")
                left.append((child, depth + 1))
        elif isinstance(value, list):
            left += ((child, depth + 1) for child in value)


@dataclass(frozen=True, slots=True)
class _Weight:
    """How large a schema gets, as its intersections are written out.

    ``size`` counts its parts, ``options`` the alternatives by which an intersection multiplies it, ``patterns`` the automata
    that are built to find out whether it can be met, ``together`` the patterns that one string must match at once.
    """

    size: int = 1
    options: int = 1
    patterns: int = 0
    together: int = 0


class _SchemaCheck:
    """Refuses a schema that would take llguidance too much stack, time or memory."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._targets: dict[str, Any] = {"#": root}
        self._memo: dict[tuple[int, bool], _Weight] = {}
        self._open: set[tuple[int, bool]] = set()
        self._multiples: list[int] = []
        self._intersects = False
        self._num_names = 0
        self._patterns: list[str] = []

    def run(self) -> None:
        depths, edges = dict[str, int](), dict[str, set[str]]()
        left = ["#"]
        size = patterns = 0
        while left:
            name = left.pop()
            if name in depths:
                continue
            nodes = list(self._walk(self._targets[name]))
            depths[name] = max((depth for _, depth in nodes), default=0) + 1
            edges[name] = {self._resolve(node["$ref"]) for node, _ in nodes if "$ref" in node}
            if len(depths) > MAX_REFS:
                refuse(f"the schema has more than {MAX_REFS} different $ref")
            left += edges[name]
            for node, _ in nodes:
                self._check_node(node)
        _check_levels(depths, edges)
        for name in depths:
            for node, _ in self._walk(self._targets[name]):
                weight = self._weigh(node, deep=False) if _is_intersection(node) else _own_weight(node)
                size, patterns = size + weight.size, patterns + weight.patterns
                if size > MAX_EXPANDED:
                    refuse("the schema is too complex: its combinations of $ref, allOf, anyOf and oneOf are too many")
                if patterns > MAX_PATTERNS:
                    refuse("the schema is too complex: too many combinations of pattern, format and patternProperties")
                if weight.together > MAX_PATTERNS_TOGETHER:
                    refuse(f"the schema is too complex: more than {MAX_PATTERNS_TOGETHER} patterns for one string")
        if self._intersects and self._num_names > 2 * MAX_MEMBERS:
            refuse(f"the schema is too complex: more than {2 * MAX_MEMBERS} properties beside allOf, anyOf or oneOf")
        for pattern in self._patterns:
            check_regex(pattern)
        check_size("".join(self._patterns), MAX_REGEX_BYTES)
        states = math.lcm(*self._multiples) if self._intersects else sum(self._multiples)
        if states > MAX_MULTIPLES:
            refuse("multipleOf is too large, or there are too many: the digits of all may make at most 10000 together")

    def _walk(self, schema: Any) -> Iterator[tuple[Schema, int]]:
        """Every schema inside ``schema`` and how deep it lies, without following $ref."""
        left = [(schema, 0)]
        while left:
            node, depth = left.pop()
            if isinstance(node, dict):
                yield node, depth
                left += ((child, depth + 1) for child in (*_children(node), *_branches(node)))

    def _resolve(self, ref: Any) -> str:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            refuse('$ref must be "#" or begin with "#/": only what is in the schema itself can be referred to')
        if ref not in self._targets:
            value: Any = self._root
            for part in unquote(ref).split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                if isinstance(value, list) and part.isascii() and part.isdigit() and len(part) < 6:
                    value = value[int(part)] if int(part) < len(value) else None
                else:
                    value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, dict | bool):
                refuse(f"$ref {ref[:100]!r} leads to no schema")
            self._targets[ref] = value
        return ref

    def _check_node(self, node: Schema) -> None:
        if node is not self._root and ("$id" in node or "id" in node or "$schema" in node):
            refuse("$id and $schema are supported at the top of a schema only")
        if "$dynamicRef" in node or "$recursiveRef" in node:
            refuse("$dynamicRef and $recursiveRef are not supported")
        names = len({*_mapping(node, "properties"), *map(str, _sequence(node, "required"))})
        self._num_names += names
        counted = "minProperties" in node or "maxProperties" in node
        if counted and names > MAX_COUNTED_PROPERTIES:
            refuse(f"minProperties and maxProperties are supported beside at most {MAX_COUNTED_PROPERTIES} properties")
        self._intersects = self._intersects or _is_intersection(node)
        self._patterns += (str(pattern) for pattern in (node.get("pattern", ""), *_mapping(node, "patternProperties")))
        if "multipleOf" in node:
            self._multiples.append(_digits(node["multipleOf"]))

    def _weigh(self, node: Any, *, deep: bool) -> _Weight:
        """The weight with every $ref that is intersected written out; with ``deep``, those in properties and items too. The
        recursion is as deep as MAX_SCHEMA_LEVELS at most: ``run`` has seen to that."""
        if not isinstance(node, dict):
            return _Weight()
        key = (id(node), deep)
        if (known := self._memo.get(key)) is not None:
            return known
        if key in self._open:
            refuse("the schema is too complex: a recursive $ref is combined with other constraints")
        self._open.add(key)
        num_nested = bool(_children(node)) + ("$ref" in node) + len(_branches(node))
        deep = deep or (num_nested > 1 and _is_intersection(node))
        parts = [_own_weight(node)]
        for child in _children(node):
            if deep or not isinstance(child, dict) or "$ref" not in child or _is_intersection(child):
                parts[0] = _beside(parts[0], self._weigh(child, deep=deep))
        if "$ref" in node:
            parts.append(self._weigh(self._targets[self._resolve(node["$ref"])], deep=deep))
        for member in _sequence(node, "allOf"):
            parts.append(self._weigh(member, deep=deep))
        for keyword in ("anyOf", "oneOf"):
            if members := _sequence(node, keyword):
                group = _Weight(size=0, options=0)  # there is a member at least
                for member in members:
                    weight = self._weigh(member, deep=deep)
                    group = _Weight(
                        size=group.size + weight.size,
                        options=group.options + weight.options,
                        patterns=group.patterns + weight.patterns,
                        together=max(group.together, weight.together),
                    )
                parts.append(group)
        self._open.discard(key)
        self._memo[key] = weight = _intersection(parts)
        return weight


def _check_levels(depths: dict[str, int], edges: dict[str, set[str]]) -> None:
    """The longest way down through the schemas that $ref names, whatever the order in which they are entered. Those that
    reach one another can be entered one from inside the other, all of them."""
    names = list(depths)
    number = {name: index for index, name in enumerate(names)}
    reach = [1 << number[name] | sum(1 << number[target] for target in edges[name]) for name in names]
    for middle in range(len(names)):
        for start in range(len(names)):
            if reach[start] >> middle & 1:
                reach[start] |= reach[middle]
    levels = dict[int, int]()
    # Whoever is reached, but does not reach back, reaches fewer.
    for start in sorted(range(len(names)), key=lambda index: reach[index].bit_count()):
        own, below = depths[names[start]], 0
        for other in range(len(names)):
            if other != start and reach[start] >> other & 1:
                if reach[other] >> start & 1:
                    own += depths[names[other]]
                else:
                    below = max(below, levels[other])
        levels[start] = own + below
        if levels[start] > MAX_SCHEMA_LEVELS:
            refuse(f"the schema is nested more than {MAX_SCHEMA_LEVELS} deep through $ref")


def _mapping(node: Schema, key: str) -> Schema:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _sequence(node: Schema, key: str) -> list[Any]:
    value = node.get(key)
    return list(value) if isinstance(value, list) else []


def _children(node: Schema) -> list[Any]:
    """The schemas of properties and items."""
    found = [child for key in _MAPS for child in _mapping(node, key).values()]
    found += [child for key in _LISTS for child in _sequence(node, key)]
    return found + [node[key] for key in _SINGLE if isinstance(node.get(key), dict)]


def _branches(node: Schema) -> list[Any]:
    """The schemas that hold for the same value."""
    return [child for key in ("allOf", "anyOf", "oneOf") for child in _sequence(node, key)]


def _is_intersection(node: Schema) -> bool:
    """Whether several constraints on the same value have to be combined."""
    in_place = [key for key in node if key in _IN_PLACE]
    others = any(key not in _ANNOTATIONS and key not in _IN_PLACE for key in node)
    return len(in_place) + others > 1 or len(_sequence(node, "allOf")) > 1


def _own_weight(node: Schema) -> _Weight:
    """What the node's own keywords weigh, without the schemas in it."""
    types = node.get("type")
    constrained = any(key not in _ANNOTATIONS and key not in _IN_PLACE for key in node)
    options = len(types) if isinstance(types, list) else 1 if "type" in node or not constrained else 6
    options += len(_sequence(node, "enum"))
    # An object with a count of its properties is written out once for each.
    options += 2_000 if "minProperties" in node or "maxProperties" in node else 0
    num_patterns = ("pattern" in node) + ("format" in node)
    return _Weight(
        options=max(options, 1),
        size=1 + len(_sequence(node, "enum")) + len(_sequence(node, "required")),
        patterns=num_patterns + 16 * len(_mapping(node, "patternProperties")),
        together=num_patterns,
    )


def _beside(one: _Weight, other: _Weight) -> _Weight:
    """Of an object's own constraints and one of its properties."""
    return _Weight(
        size=one.size + other.size,
        options=one.options + other.options - 1,
        patterns=one.patterns + other.patterns,
        together=max(one.together, other.together),
    )


def _intersection(parts: list[_Weight]) -> _Weight:
    product = math.prod(part.options for part in parts)
    return _Weight(
        size=min(sum(part.size * product // part.options for part in parts), 10 * MAX_EXPANDED),
        options=min(product, 10 * MAX_EXPANDED),
        patterns=min(len(parts) * sum(part.patterns * product // part.options for part in parts), 10 * MAX_PATTERNS),
        together=sum(part.together for part in parts),
    )


def _digits(multiple: Any) -> int:
    """The significant digits of a multipleOf, as a number: 0.25 → 25. Remainders by it are states of an automaton."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not multiple:
        refuse("multipleOf must be a number other than 0")
    mantissa = Decimal(repr(multiple)).as_tuple()
    digits = int("".join(map(str, mantissa.digits)))
    exponent = int(mantissa.exponent)
    return digits * 10 ** min(exponent, 10) if exponent > 0 else digits
