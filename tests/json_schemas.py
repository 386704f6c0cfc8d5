"""Random JSON schemas of the kind that a response_format takes, each of which some value meets."""

from functools import cache
from typing import Any

from hypothesis import strategies as st

FORMATS = ("uuid", "ipv4", "ipv6", "email")
"""Those that jsonschema checks without further packages, and that need no calendar."""

PATTERNS = ("^[a-z]{2,5}$", r"^\d{3}-\d{4}$", "^(ab|cd)+$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "x", r"^\w{1,9}@\w{1,9}\.com$")
NAMES = ("a", "b", "name", "größe", 'quo"ted', "long property name", "x-1", "")

Schema = dict[str, Any]

scalars = (
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(st.characters(codec="utf-8", exclude_categories=["C"]))
)


@st.composite
def json_schemas(draw: st.DrawFn) -> Schema:
    """A schema with an object, an array, a scalar, or any of them at its root; half of them with ``$defs``."""
    if not draw(st.booleans()):
        return draw(_schemas(3, ()))
    definitions = {f"d{index}": draw(_schemas(1, ())) for index in range(draw(st.integers(1, 2)))}
    refs = tuple(f"#/$defs/{name}" for name in definitions)
    definitions["list"] = {
        "type": "object",
        "properties": {"value": draw(_schemas(1, refs)), "next": {"$ref": "#/$defs/list"}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return draw(_schemas(3, (*refs, "#/$defs/list"))) | {"$defs": definitions}


@cache
def _schemas(depth: int, refs: tuple[str, ...]) -> st.SearchStrategy[Schema]:
    leaves = _strings() | _integers() | _numbers() | _literals() | st.just({"type": "boolean"}) | st.just({"type": "null"})
    if refs:
        leaves |= st.sampled_from(refs).map(lambda ref: {"$ref": ref})
    if depth == 0:
        return leaves
    return leaves | _objects(depth - 1, refs) | _arrays(depth - 1, refs) | _unions(depth - 1, refs)


def _literals() -> st.SearchStrategy[Schema]:
    values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.sampled_from(NAMES), scalars, max_size=3)
    return st.builds(lambda value: {"const": value}, values) | st.builds(
        lambda members: {"enum": members}, st.lists(values, min_size=1, max_size=5)
    )


@st.composite
def _strings(draw: st.DrawFn) -> Schema:
    kind = draw(st.sampled_from(("any", "length", "pattern", "format", "nullable")))
    if kind == "length":
        low = draw(st.integers(0, 5))
        bounds = {"minLength": low, "maxLength": low + draw(st.integers(0, 10))}
        return {"type": "string"} | {
            key: bounds[key] for key in draw(st.sampled_from((["minLength"], ["maxLength"], [*bounds])))
        }
    extra = {"pattern": draw(st.sampled_from(PATTERNS)), "format": draw(st.sampled_from(FORMATS))}
    return {"type": ["string", "null"] if kind == "nullable" else "string"} | ({kind: extra[kind]} if kind in extra else {})


@st.composite
def _integers(draw: st.DrawFn) -> Schema:
    low, step = draw(st.integers(-10_000, 10_000)), draw(st.integers(1, 50))
    bounds = {"minimum": low, "exclusiveMaximum": low + 2 * step + 1}  # wide enough for two multiples
    keys = draw(st.sets(st.sampled_from((*bounds, "multipleOf"))))
    return {"type": "integer"} | {key: value for key, value in {**bounds, "multipleOf": step}.items() if key in keys}


@st.composite
def _numbers(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-100, 100))
    bounds = {
        draw(st.sampled_from(("minimum", "exclusiveMinimum"))): low,
        draw(st.sampled_from(("maximum", "exclusiveMaximum"))): low + draw(st.integers(1, 100)),
    }
    keys = draw(st.sets(st.sampled_from([*bounds])))
    return {"type": "number"} | {key: bounds[key] for key in sorted(keys)}


@st.composite
def _objects(draw: st.DrawFn, depth: int, refs: tuple[str, ...]) -> Schema:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    schema: Schema = {"type": "object", "properties": {name: draw(_schemas(depth, refs)) for name in names}}
    schema["required"] = [name for name in names if draw(st.booleans())]
    additional = draw(st.none() | st.just(False) | _schemas(0, refs))
    return schema if additional is None else schema | {"additionalProperties": additional}


@st.composite
def _arrays(draw: st.DrawFn, depth: int, refs: tuple[str, ...]) -> Schema:
    prefix = draw(st.lists(_schemas(depth, refs), max_size=2))
    low = draw(st.integers(0, 3))
    schema: Schema = {"type": "array", "items": draw(_schemas(depth, refs)), "minItems": low}
    if draw(st.booleans()):
        schema["maxItems"] = low + draw(st.integers(0, 2))
    return schema | ({"prefixItems": prefix} if prefix else {})


def _unions(depth: int, refs: tuple[str, ...]) -> st.SearchStrategy[Schema]:
    return st.builds(lambda members: {"anyOf": members}, st.lists(_schemas(depth, refs), min_size=1, max_size=3))
