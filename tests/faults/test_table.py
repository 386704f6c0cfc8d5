"""The table of faults in docs/architecture.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    line
    for line in (ROOT / "docs/architecture.md")
    .read_text(encoding="utf-8")
    .split("## Faults")[1]
    .split("\n## ")[0]
    .splitlines()
    if line.startswith("|")
][2:]


def test_there_are_rows() -> None:
    """The table is where it is looked for."""
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_a_fault_has_its_tests(row: str) -> None:
    """Each row names at least one test, and each that it names exists; one without a file is in the file before it."""
    names = re.findall(r"`([^`]*)`", row.split("|")[3])
    assert names
    path = ""
    for name in names:
        path, _, test = name.rpartition("::") if "::" in name else (path, "", name)
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
