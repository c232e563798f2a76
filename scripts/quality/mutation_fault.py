"""What ``mutation_check.py`` plants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One edit, and the tests that must see it."""

    name: str
    file: str  #: under mofq/
    old: str  #: stands there exactly once
    new: str
    tests: str  #: names of test files without test_ and .py, or one test of a file behind ``::``
