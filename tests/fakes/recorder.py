"""Remembers which calls were made to a module."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Call(NamedTuple):
    """``name`` is a function's, or Class.method's; ``args`` are without self."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder:
    """A module that remembers the calls made to its functions, and to its classes and their objects' methods."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        thing = getattr(self._module, name)
        return self._class(thing) if inspect.isclass(thing) else self._function(name, thing)

    def _function(self, name: str, function: Callable[..., Any], *, is_method: bool = False) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(Call(name, args[is_method:], kwargs))
            return function(*args, **kwargs)

        return call

    def _class(self, cls: type) -> type:
        methods = {
            name: self._function(f"{cls.__name__}.{name}", getattr(cls, name), is_method=True)
            for name in ("__init__", "reset_workspace_buffer", "plan", "run")
        }
        return type(cls.__name__, (cls,), methods)
