"""The places in the runtime and in the client where a task can be suspended, and at which of them a task stands."""

import ast
import dis
import gc
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType
from typing import Any

import ferrum_rt

PACKAGE = Path(ferrum_rt.__file__).parent
FOLDERS = ("runtime", "ipc")

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_STEPS = ("async_generator_asend", "async_generator_athrow")
_KINDS = ("await", "enter", "exit")  # by the argument of GET_AWAITABLE


def all_awaits() -> set[str]:
    """The name of each, as ``runtime/threads/worker.py Job.wait: await self._done.wait()``. An ``async with`` is two."""
    paths = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]
    return {name for path in paths for _, _, name in _awaits_in(str(path))}


def standing_at(task: Any) -> list[str]:
    """The names of those at which this coroutine is suspended, the outermost first."""
    return [name for frame in _frames(task) if (name := _name_of(frame)) is not None]


@cache
def _awaits_in(path: str) -> list[tuple[ast.AST, str, str]]:
    """The node, its kind and its name for each in a file. Of two that read alike in one function the second is ``#2``."""
    found: list[tuple[ast.AST, str, str]] = []
    seen: Counter[str] = Counter()

    def visit(node: ast.AST, scope: str) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            scope = f"{scope}.{node.name}" if scope else node.name
        for kind, text in _parts(node):
            name = f"{Path(path).relative_to(PACKAGE)} {scope}: {text}"
            seen[name] += 1
            found.append((node, kind, name if seen[name] == 1 else f"{name} #{seen[name]}"))
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(ast.parse(Path(path).read_text(encoding="utf-8")), "")
    return found


def _parts(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Await):
        yield "await", ast.unparse(node)
    elif isinstance(node, ast.AsyncFor):
        yield "for", f"async for {ast.unparse(node.target)} in {ast.unparse(node.iter)}"
    elif isinstance(node, _COMPREHENSIONS) and any(part.is_async for part in node.generators):
        yield "for", ast.unparse(node)
    elif isinstance(node, ast.AsyncWith):
        text = ", ".join(ast.unparse(item) for item in node.items)
        yield "enter", f"async with {text}: enter"
        yield "exit", f"async with {text}: exit"


def _frames(task: Any) -> Iterator[FrameType]:
    while task is not None:
        if isinstance(task, CoroutineType):
            frame, task = task.cr_frame, task.cr_await
        elif isinstance(task, AsyncGeneratorType):
            frame, task = task.ag_frame, task.ag_await
        elif type(task).__name__ in _STEPS:  # which do not say whose they are
            frame, task = None, next(found for found in gc.get_referents(task) if isinstance(found, AsyncGeneratorType))
        else:
            return
        if frame is not None:
            yield frame


def _name_of(frame: FrameType) -> str | None:
    path = frame.f_code.co_filename
    if not any(path.startswith(f"{PACKAGE / folder}/") for folder in FOLDERS):
        return None
    return _name_at(frame.f_code, frame.f_lasti)


@cache
def _name_at(code: CodeType, offset: int) -> str | None:
    """Of the await that the instruction at ``offset`` belongs to."""
    last: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        if instruction.offset > offset:
            break
        if instruction.opname in ("GET_AWAITABLE", "GET_ANEXT"):
            last = instruction
    if last is None or last.positions is None:
        return None
    kind = "for" if last.opname == "GET_ANEXT" else _KINDS[last.arg or 0]
    place = last.positions
    around = [
        (node.end_lineno - node.lineno, node.end_col_offset - node.col_offset, name)  # type: ignore[attr-defined]
        for node, of_kind, name in _awaits_in(code.co_filename)
        if of_kind == kind or (kind == "await" and isinstance(node, _COMPREHENSIONS))
        if (node.lineno, node.col_offset) <= (place.lineno, place.col_offset)  # type: ignore[attr-defined]
        and (node.end_lineno, node.end_col_offset) >= (place.end_lineno, place.end_col_offset)  # type: ignore[attr-defined]
    ]
    return min(around)[2] if around else None
