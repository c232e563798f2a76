"""What ``mutation_check.py`` plants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """One edit, and the tests that must see it."""

    name: str
    old: str  #: stands exactly once in all of mofq/, in whatever file
    new: str
    tests: str  #: names of test files without test_ and .py, or one test of a file behind ``::``


def read_sources(checkout: Path) -> dict[Path, str]:
    """The text of every source file of mofq."""
    return {path: path.read_text("utf-8") for path in sorted((checkout / "mofq").rglob("*.py"))}


def find_fault(fault: Fault, sources: Mapping[Path, str]) -> Path | None:
    """The file that has the words of a fault; None where they do not stand there exactly once."""
    found = [path for path, text in sources.items() for _ in range(text.count(fault.old))]
    return found[0] if len(found) == 1 else None


def find_tests(fault: Fault, checkout: Path) -> list[str]:
    """The tests of a fault as pytest takes them: ``tests/ROOM/test_FILE.py::TEST``.

    Raises:
        FileNotFoundError: There is no such file of tests, or it has no such test.
    """
    tests = []
    for named in fault.tests.split():
        file, mark, test = named.partition("::")
        paths = sorted((checkout / "tests").rglob(f"test_{file}.py"))
        if len(paths) != 1 or (mark and f"def {test}(" not in paths[0].read_text("utf-8")):
            raise FileNotFoundError(f"{fault.name!r}: there is no {named} in tests/")
        tests.append(f"{paths[0].relative_to(checkout)}{mark}{test}")
    return tests
