"""Names of modules say what is in them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(p for folder in ("mofq", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))
MEANINGLESS_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(p) for p in FILES if p.stem in MEANINGLESS_NAMES] == []
