"""Names of modules say what is in them, and scripts name all files of the tests that they run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(p for folder in ("mofq", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))
MEANINGLESS_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(p) for p in FILES if p.stem in MEANINGLESS_NAMES] == []


def test_the_checks_on_a_real_model_name_every_file_of_theirs() -> None:
    script = (ROOT / "scripts" / "quality" / "check_real.sh").read_text("utf-8")
    marked = "mark." + "real"
    paths = [path for path in FILES if marked in path.read_text("utf-8")]
    assert len(paths) >= 2
    assert [str(p) for p in paths if str(p.relative_to(ROOT)) not in script] == []
