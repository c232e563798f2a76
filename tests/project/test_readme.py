"""What the documentation tells a user to type is what the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mofq as package
from mofq.cli.commands import command as mofq_command

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
#: A block with this comment takes minutes.
_HEAVY = "# on SmolLM2"


@dataclass(frozen=True, slots=True)
class Command:
    """One command line of a document."""

    where: str
    words: tuple[str, ...]
    is_heavy: bool


def blocks(path: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """Line number and text of every block in some languages."""
    text = path.read_text("utf-8")
    for match in _BLOCK.finditer(text):
        if match[1] in languages:
            yield text[: match.start()].count("\n") + 2, match[2]


def commands(path: Path) -> Iterator[Command]:
    for line, block in blocks(path, "bash", ""):
        joined = block.replace("\\\n", " ")
        is_shell = joined.startswith(("mofq ", "python ", "bash ", "#", "$ ", "pip ", "vllm "))
        for text in joined.splitlines() if is_shell else ():
            words = shlex.split(text, comments=True)
            if words:
                where = f"{path.relative_to(ROOT)}:{line}"
                yield Command(where, tuple(words), is_heavy=_HEAVY in block)


ALL = [command for path in DOCUMENTS for command in commands(path)]
MOFQ = [command for command in ALL if command.words[0] == "mofq"]


def parse(words: tuple[str, ...]) -> None:
    """Let the command line read the words, and run nothing.

    Raises:
        UsageError: There is no such command or option, or a value is missing.
    """
    command: Any = mofq_command
    context = command.make_context("mofq", list(words[1:]), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None, f"no command {name!r}"
        context = command.make_context(name, rest, parent=context)


def test_the_readme_opens_with_the_two_commands_that_do_everything() -> None:
    first = next(blocks(ROOT / "README.md", "bash"))[1]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == [
        "bash scripts/demo.sh",
        "bash scripts/test.sh",
    ]


def test_the_readme_shows_every_command_of_the_flow() -> None:
    shown = {command.words[1] for command in MOFQ if len(command.words) > 1}
    flow = {"inspect", "calibrate", "measure", "search", "validate", "export"}
    assert flow - shown == set()


@pytest.mark.parametrize("command", MOFQ, ids=lambda one: f"{one.where} {' '.join(one.words)[:60]}")
def test_a_command_in_the_documents_is_one_that_mofq_takes(command: Command) -> None:
    parse(command.words)


def test_a_misspelt_option_or_command_would_be_seen() -> None:
    for words in (
        "mofq search t.jsonl --max-bit 5 -o r.yaml",
        "mofq serch t.jsonl",
        "mofq validate m r",
    ):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(tuple(words.split()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_links_that_a_document_names_are_there(path: Path) -> None:
    scripts = [word for command in commands(path) for word in command.words if "scripts/" in word]
    links = [link.partition("#")[0] for link in _LINK.findall(path.read_text("utf-8"))]
    local = [link for link in links if link and "://" not in link]
    assert [word for word in scripts if not (ROOT / word).exists()] == []
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_a_document_names_what_mofq_has(path: Path) -> None:
    for line, block in blocks(path, "python"):
        compile(block, f"{path.name}:{line}", "exec")
        for name in re.findall(r"\bmofq\.(\w+)\(", block):
            assert hasattr(package, name), f"{path.name}:{line}: mofq.{name}"
