"""What one render of a chat template may spend, and what the things that templates do cost at the most."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2

# Seconds of the rendering thread's own time, so that a host that holds the GIL fails no request. A conversation of 100 turns
# takes some milliseconds.
MAX_SECONDS = 0.5
# What a render may read and make, in characters, which take one to four bytes; texts that it drops again count too. For a
# megabyte of messages it is a few million.
MAX_CHARACTERS = 32 << 20
# What a step costs, and an object beside its characters: about its memory, and what is read in the time of a step.
STEP = 16
# The clock is looked at each time so much has been spent: often enough to stop in time, seldom enough not to be seen.
LOOK_EVERY = 1 << 14
# A value written out in full, with what it holds several times counted so often: lists of lists double with each step.
MAX_VALUE = 4 << 20
# Levels of values in values, and of calls in calls. Python crashes on hashing a tuple of very many levels.
MAX_DEPTH = 100
# Arithmetic on longer numbers takes longer than a step.
MAX_INTEGER_BITS = 1024

CONTAINERS: tuple[Any, ...] = (list, tuple, dict, range, type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """The template would take more than one render may."""


class Budget:
    """What one render may still spend, in characters."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._left = MAX_CHARACTERS
        self._look_at = MAX_CHARACTERS - LOOK_EVERY
        self._deadline = time.thread_time() + MAX_SECONDS
        # Values by id, with size and depth; a template cannot change them. Holding them keeps their ids theirs.
        self._measured: dict[int, tuple[Any, int, int]] = {}

    def spend(self, cost: int) -> None:
        self._left -= cost
        if self._left < self._look_at:
            if self._left < 0:
                raise TemplateLimitError(f"it handles more than {MAX_CHARACTERS} characters")
            if time.thread_time() > self._deadline:
                raise TemplateLimitError(f"it takes more than {MAX_SECONDS} s")
            self._look_at = self._left - LOOK_EVERY

    def size(self, value: Any) -> int:
        """Characters of a value written out in full, roughly."""
        return len(value) if isinstance(value, str) else self.measure(value)[0]

    def sizes(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
        return sum([self.size(value) for value in (*args, *kwargs.values())])

    def measure(self, value: Any, room: int = MAX_DEPTH) -> tuple[int, int]:
        """Size and depth of a value that may be ``room`` deep; of a string, a number or a thing unknown, 0 deep."""
        if not isinstance(value, CONTAINERS):
            return len(value) if isinstance(value, str) else STEP, 0
        known = self._measured.get(id(value))
        if known is None:
            size, depth = STEP * (1 + len(value)), 0
            self.spend(size)
            for part in _parts(value) if room else ():
                if isinstance(part, str):
                    size += len(part)
                elif isinstance(part, CONTAINERS):
                    part_size, part_depth = self.measure(part, room - 1)
                    size, depth = size + part_size, max(depth, part_depth)
            known = self._measured[id(value)] = (value, size, depth + 1)
        if known[1] > MAX_VALUE:
            raise TemplateLimitError(f"it makes a value of more than {MAX_VALUE} characters")
        if known[2] > room:
            raise TemplateLimitError(f"it nests values more than {MAX_DEPTH} deep")
        return known[1:]

    def walk(self, items: Iterator[Any], each: int) -> Iterator[Any]:
        """The items, paid for as they come."""
        for item in items:
            self.spend(each + shallow_size(item) if isinstance(item, list) else each)
            yield item


def shallow_size(value: Any) -> int:
    """Size of a value without what it holds."""
    if isinstance(value, str):
        return len(value)
    return STEP * len(value) if hasattr(type(value), "__len__") else STEP


def _parts(value: Any) -> Iterable[Any]:
    """What a container holds; a range holds nothing worth a look."""
    if isinstance(value, dict):
        return (*value, *value.values())
    return () if isinstance(value, range) else value


def operator_cost(budget: Budget, operator: str, left: Any, right: Any) -> int:
    if operator == "+":
        return STEP + shallow_size(left) + shallow_size(right)
    if operator == "%" and isinstance(left, str):
        values = right if isinstance(right, tuple) else (right,)
        return STEP + len(left) + budget.sizes(values, {}) + _printf(budget, left, *values)
    if operator == "*":
        repeated, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int) and not isinstance(repeated, int):
            return STEP + shallow_size(repeated) * max(0, times)
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        check_bits(int(left).bit_length() * int(right))
    return STEP


def method_cost(budget: Budget, method: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Of a string's methods."""
    cost = len(text) + (budget.sizes(args, kwargs) if args or kwargs else 0)
    multiplied = _METHOD_COSTS.get(method)
    return cost + multiplied(budget, text, *args, **kwargs) if multiplied else cost


def keys_cost(args: tuple[Any, ...]) -> int:
    """Of making a dict: keys can be chosen so that each is compared with all the others."""
    return sum(shallow_size(arg) + len(arg) ** 2 for arg in args if hasattr(arg, "__len__") and not isinstance(arg, dict))


def check_bits(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise TemplateLimitError(f"it makes a number of more than {MAX_INTEGER_BITS} bits")


# -- how much an operation multiplies; the parameters are the operation's own ----------------------------------------------


def _number(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0


def _padded(budget: Budget, text: Any, width: Any = 80, fill: Any = " ") -> int:
    return _number(width)


def _indented(budget: Budget, text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    return (budget.size(text) + 1) * (len(width) if isinstance(width, str) else _number(width))


def _replaced(budget: Budget, text: Any, old: Any, new: Any, count: Any = None) -> int:
    return int(str(text).count(str(old)) * budget.size(new))


def _joined(budget: Budget, items: Any, separator: Any = "", attribute: Any = None) -> int:
    return int(len(items) * budget.size(separator))


def _joining(budget: Budget, separator: str, items: Any) -> int:
    return _joined(budget, items, separator)


def _printf(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> int:
    """A value may be shown as often as there are signs, and with a star any number may be a width."""
    text, values = str(text), (*args, *kwargs.values())
    starred: int = text.count("*") * sum(_number(value) for value in values)
    return int(text.count("%")) * budget.sizes(values, {}) + starred + _written_numbers(text)


def _formatted(budget: Budget, text: str, *args: Any, **kwargs: Any) -> int:
    if re.search(r"\{[^{}]*\{", text.replace("{{", "")):
        raise TemplateLimitError("it formats to a width that is itself a field")
    looked_up = STEP * (text.count(".") + text.count("["))
    return text.count("{") * budget.sizes(args, kwargs) + looked_up + _written_numbers(text)


def _written_numbers(text: str) -> int:
    return sum(int(digits[0]) for digits in re.finditer(r"\d+", text))


def _stripped(budget: Budget, text: Any, chars: Any = None) -> int:
    """Each character is looked for among those to strip."""
    return len(text) * len(chars) if isinstance(text, str) and isinstance(chars, str) else 0


def _from_the_right(budget: Budget, text: str, sep: Any = None, *args: Any, **kwargs: Any) -> int:
    """Python searches forwards in linear time, but not backwards."""
    return _split(budget, text, sep) + (len(text) * len(sep) if isinstance(sep, str) else 0)


def _split(budget: Budget, text: str, sep: Any = None, maxsplit: Any = -1) -> int:
    return STEP * (1 + text.count(sep)) if isinstance(sep, str) and sep else STEP * len(text)


def _characters(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> int:
    """A text may be taken apart into as many pieces."""
    return STEP * len(text) if isinstance(text, str) else 0


def _grouped(budget: Budget, value: Any, number: Any, fill_with: Any = None) -> int:
    return STEP * _number(number)


def _rounded(budget: Budget, value: Any, precision: Any = 0, method: Any = "common") -> int:
    return abs(precision) ** 2 if isinstance(precision, int) else 0


def _summed(budget: Budget, items: Any, attribute: Any = None, start: Any = 0) -> int:
    """Lists are added up by copying each sum."""
    return 0 if isinstance(start, int | float) else len(items) * budget.size(items)


def _squared(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    """Regular expressions and loops over strings that are copied each time."""
    return (budget.size(value) + budget.sizes(args, kwargs)) ** 2


def _json(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> int:
    size, depth = budget.measure(value)
    each = (len(indent) if isinstance(indent, str) else _number(indent)) * depth + budget.size(separators)
    return size // STEP * each


FILTER_COSTS: dict[str, Callable[..., int]] = {
    "batch": _grouped,
    "center": _padded,
    "format": _printf,
    "indent": _indented,
    "join": _joined,
    "pprint": _squared,
    "replace": _replaced,
    "round": _rounded,
    "slice": _grouped,
    "striptags": _squared,
    "sum": _summed,
    "title": _characters,
    "tojson": _json,
    "trim": _stripped,
    "urlize": _squared,
    "wordcount": _characters,
    "wordwrap": _squared,
    "xmlattr": _squared,
}
_METHOD_COSTS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "format": _formatted,
    "format_map": _formatted,
    "join": _joining,
    "ljust": _padded,
    "lstrip": _stripped,
    "replace": _replaced,
    "rfind": _from_the_right,
    "rindex": _from_the_right,
    "rjust": _padded,
    "rpartition": _from_the_right,
    "rsplit": _from_the_right,
    "rstrip": _stripped,
    "split": _split,
    "splitlines": _characters,
    "strip": _stripped,
    "striptags": _squared,
    "zfill": _padded,
}
