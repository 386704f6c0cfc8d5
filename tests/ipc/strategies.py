"""Hypothesis strategies for the messages of the protocol, made from their types."""

from collections.abc import Mapping
from typing import Any, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from ferrum_rt.ipc.messages import ClientMessage, ServerMessage

_MANY = 3


def messages(union: Any) -> st.SearchStrategy[Any]:
    """Any message of ClientMessage or ServerMessage that its encoder takes."""
    return st.one_of([_of(inspect.type_info(kind)) for kind in get_args(union)])


def _of(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, as long as its bounds allow but for a few entries."""
    match kind:
        case inspect.StructType():
            return _struct(kind)
        case inspect.UnionType():
            return st.one_of([_of(part) for part in kind.types])
        case inspect.ListType() | inspect.CollectionType() | inspect.VarTupleType():
            return st.lists(_of(kind.item_type), max_size=_MANY)
        case inspect.TupleType():
            return st.tuples(*map(_of, kind.item_types))
        case inspect.DictType():
            return st.dictionaries(_of(kind.key_type), _of(kind.value_type), max_size=_MANY)
        case inspect.StrType():
            short = st.text(min_size=kind.min_length or 0, max_size=min(kind.max_length or 40, 40))
            return short | st.just("é" * (kind.max_length or 300))
        case inspect.IntType():
            return st.integers(-(2**63) if kind.ge is None else kind.ge, 2**64 - 1)
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.EnumType():
            return st.sampled_from(list(kind.cls))
        case inspect.CustomType():
            raise AssertionError(f"no strategy for {kind.cls}")
        case _:
            return _PLAIN[type(kind)]


def _struct(kind: inspect.StructType) -> st.SearchStrategy[Any]:
    required = {field.name: _of(field.type) for field in kind.fields if field.required}
    optional = {field.name: _of(field.type) for field in kind.fields if not field.required}

    def build(fields: Mapping[str, Any]) -> msgspec.Struct:
        built: msgspec.Struct = kind.cls(**fields)
        return built

    return st.fixed_dictionaries(required, optional=optional).map(build)


_PLAIN: dict[type[inspect.Type], st.SearchStrategy[Any]] = {
    inspect.BoolType: st.booleans(),
    inspect.FloatType: st.floats(),
    inspect.BytesType: st.binary(max_size=20),
    inspect.NoneType: st.none(),
}

client_messages = messages(ClientMessage)
server_messages = messages(ServerMessage)
