"""The measurable rules of style, for every Python file of the project."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(p for folder in ("mofq", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))
LINES_PER_FILE = 400
LINES_PER_FUNCTION = 40
MEANINGLESS_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, Function):
            yield node


def is_command(function: Function) -> bool:
    """Whether the parameters are a command's table of options."""
    return any(".command(" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines_without_docstring(function: Function) -> int:
    first, last = function.body[0], function.body[-1].end_lineno
    assert last is not None
    assert first.end_lineno is not None
    lines = last - (first.lineno if is_command(function) else function.lineno) + 1
    documented = ast.get_docstring(function) is not None
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


def where(path: Path, function: Function) -> str:
    return f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > LINES_PER_FILE} == {}


def test_no_function_is_longer_than_40_lines_without_its_docstring() -> None:
    assert [
        where(path, function)
        for path in FILES
        for function in functions(path)
        if lines_without_docstring(function) > LINES_PER_FUNCTION
    ] == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(p) for p in FILES if p.stem in MEANINGLESS_NAMES] == []
