"""The whole flow on tiny models of types without rules: a few that change with the commit."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
from families import long_but
from tiny_types import CAUSAL_TYPES, write_type
from type_flow import run_flow

from mofq.model.layers import FUSION_RULES
from mofq.model.layers.names_in_memory import known_types

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "reference" / "families.md").read_text("utf-8")
_ROW = re.compile(
    r"^\| \**`(?P<name>[\w-]+)`\** \| [^|]* \| (?P<result>passes|refused: [^|]*) \|", re.MULTILINE
)
RESULTS = {row["name"]: row["result"] for row in _ROW.finditer(PAGE)}
PASSING = [
    name for name, result in RESULTS.items() if result == "passes" and name not in FUSION_RULES
]
#: Of the fast tests.
_SAMPLE = 2


def sample(names: list[str]) -> list[str]:
    """A few names, others for every commit, and the same for all workers of a run."""
    git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    ran = subprocess.run(git, capture_output=True, text=True, check=False)
    seed = ran.stdout.strip()  # nothing where there is no repository
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return ordered[:_SAMPLE]


@pytest.mark.parametrize("name", long_but(PASSING, *sample(PASSING)))
def test_a_type_without_rules_goes_through_the_whole_flow(name: str, tmp_path: Path) -> None:
    model, work = write_type(name, tmp_path / name), tmp_path / "work"
    work.mkdir()
    assert run_flow(model, work) > 0


def test_the_page_of_families_has_every_type_with_its_result() -> None:
    not_built = re.findall(r"^- `([\w-]+)`: ", PAGE, re.MULTILINE)
    assert sorted([*RESULTS, *not_built]) == sorted(CAUSAL_TYPES)
    assert set(RESULTS) <= known_types().keys()
    assert len(PASSING) > 100
    assert f"{len(PASSING) + len(_ruled('passes'))} of the {len(CAUSAL_TYPES)} types pass" in PAGE


def test_every_family_with_rules_is_on_the_page_and_passes_up_to_the_transposed() -> None:
    refused = [name for name in FUSION_RULES if name in RESULTS and name not in _ruled("passes")]
    assert refused == ["gpt2"]


def _ruled(result: str) -> list[str]:
    return [name for name, found in RESULTS.items() if found == result and name in FUSION_RULES]
