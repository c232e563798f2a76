"""Messages leave it to their reader's interface how an option is spelled."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mofq import api
from mofq.api.options import parameters_of
from mofq.cli.flags import flag_of

MOFQ = Path(__file__).parent.parent.parent / "mofq"
#: Flags of other programs: servers, and vLLM's of the KV cache.
OF_OTHERS = ("engines", "delivery/export")
#: A command, or a part of one, which is the command line's for every reader.
COMMAND = re.compile(r"\s*(--|mofq )")
STAGES = [one for name in api.__all__ if inspect.isfunction(one := getattr(api, name))]
FLAGS = {
    flag
    for stage in STAGES
    for one in parameters_of(stage)
    for flag in (flag_of(one.name), one.option.flag or "")
    if flag.startswith("--")
}


def texts(source: str) -> Iterator[str]:
    """Strings of a module, formatted ones whole; no docstrings, and no help of options."""
    tree = ast.parse(source)
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr):
            left_out.add(node.body[0].value)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Option":
            left_out.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            left_out.update(ast.walk(node))
            parts = (getattr(one, "value", None) for one in node.values)
            yield "".join(one if isinstance(one, str) else "{}" for one in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def spelled_flags(text: str) -> set[str]:
    """Flags that a sentence spells itself, outside of commands between backticks."""
    if COMMAND.match(text):
        return set()
    return set(re.findall(r"--[a-z][a-z-]*", re.sub(r"`[^`]*`", "", text))) & FLAGS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise E(f"{n}: give --max-bits, or {o}.")', {"--max-bits"}),
        ('raise E("run `mofq calibrate`, then measure with --stats")', {"--stats"}),
        ('raise E(f"run `mofq measure --stats`, or {option(n)}")', set()),
        ('command = f"mofq search {table} --max-bits 5"', set()),
        ('def f() -> None:\n    """Takes --max-bits."""', set()),
        ('Bits = Annotated[int, Option("With --stats.")]', set()),
    ],
)
def test_a_sentence_that_spells_a_flag_is_found(source: str, found: set[str]) -> None:
    assert set().union(*map(spelled_flags, texts(source))) == found


def test_messages_outside_of_the_command_line_spell_no_flag() -> None:
    wrong = [
        f"{path.relative_to(MOFQ)}: {flags}: {text}"
        for path in sorted(MOFQ.rglob("*.py"))
        if not path.relative_to(MOFQ).as_posix().startswith(("cli", *OF_OTHERS))
        for text in texts(path.read_text("utf-8"))
        if (flags := spelled_flags(text))
    ]
    assert wrong == []
