"""The whole flow on tiny models of types without rules: one of every structure of fusion groups.

Which one changes with the version of transformers, and so do the multimodal types.
``scripts/make/families.py`` runs the same on all of them, and wrote the page that is chosen from.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import transformers
from families import long_but
from tiny_types import CAUSAL_TYPES, IMAGE_TYPES, MULTIMODAL_TYPES, write_type
from type_flow import run_flow, write_processor

from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FUSION_RULES, find_layers
from mofq.model.layers.names_in_memory import known_types

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "reference" / "families.md").read_text("utf-8")
_ROW = re.compile(
    r"^\| \**`(?P<name>[\w.-]+)`\** \| (?P<groups>[^|]*) \| (?P<result>passes|refused: [^|]*)"
    r" \| (?P<cache>[^|]*) \|",
    re.MULTILINE,
)
CAUSAL, _, MULTIMODAL = PAGE.partition("## Types that read images")
RESULTS = {row["name"]: row["result"] for row in _ROW.finditer(CAUSAL)}
GROUPS = {row["name"]: row["groups"].strip() for row in _ROW.finditer(CAUSAL)}
PASSING = [
    name for name, result in RESULTS.items() if result == "passes" and name not in FUSION_RULES
]
#: Whose KV cache went through the flow.
CACHED = {row["name"] for row in _ROW.finditer(CAUSAL) if row["cache"] == "decided"}
WITH_TOWERS = {row["name"]: row["result"] for row in _ROW.finditer(MULTIMODAL)}
PASSING_WITH_TOWERS = [name for name, result in WITH_TOWERS.items() if result == "passes"]
#: Of the fast tests.
_SAMPLE = 2
#: Of multimodal types, one of which is fast.
_SAMPLE_WITH_TOWERS = 6


def sample(names: list[str], count: int = _SAMPLE) -> list[str]:
    """A few names, others for every version of transformers, and the same for every commit."""
    seed = transformers.__version__
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return ordered[:count]


def of_each_structure(names: list[str]) -> list[str]:
    """One type of every set of fusion groups."""
    return list({GROUPS[name]: name for name in sample(names, len(names))}.values())


_DIFFERENT = of_each_structure(PASSING)


@pytest.mark.parametrize("name", long_but(_DIFFERENT, *sample(_DIFFERENT)))
def test_a_type_without_rules_goes_through_the_whole_flow(name: str, tmp_path: Path) -> None:
    model, work = write_type(name, tmp_path / name), tmp_path / "work"
    work.mkdir()
    assert run_flow(model, work) > 0


@pytest.mark.long
@pytest.mark.parametrize("name", sample([name for name in PASSING if name in CACHED]))
def test_the_kv_cache_of_a_type_without_rules_is_decided_too(name: str, tmp_path: Path) -> None:
    model = write_type(name, tmp_path / name)
    (work := tmp_path / "work").mkdir()
    assert run_flow(model, work, kv_cache=True) > 0


_SOME = sample(PASSING_WITH_TOWERS, _SAMPLE_WITH_TOWERS)


@pytest.mark.parametrize("name", long_but(_SOME, _SOME[0]))
def test_a_multimodal_type_goes_through_the_whole_flow_on_text(name: str, tmp_path: Path) -> None:
    model = write_type(name, tmp_path / name, multimodal=True)
    write_processor(model)
    (work := tmp_path / "work").mkdir()
    assert run_flow(model, work) > 0


def test_the_page_of_families_has_every_type_with_its_result() -> None:
    for page, results, types in (
        (CAUSAL, RESULTS, CAUSAL_TYPES),
        (MULTIMODAL, WITH_TOWERS, MULTIMODAL_TYPES),
    ):
        not_built = re.findall(r"^- `([\w.-]+)`: ", page, re.MULTILINE)
        assert sorted([*results, *not_built]) == sorted(types)
    images = [name for name in PASSING_WITH_TOWERS if name in IMAGE_TYPES]
    assert len(images) >= 60
    assert f"{len(images)} of the {len(IMAGE_TYPES)} types pass" in PAGE
    assert set(RESULTS) <= known_types().keys()
    assert len(PASSING) > 100
    assert f"{len(PASSING) + len(_ruled('passes'))} of the {len(CAUSAL_TYPES)} types pass" in PAGE


def test_the_stand_in_for_timm_is_a_tower_that_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_type("gemma3n", tmp_path / "gemma3n", multimodal=True)))
    tower = {name for name in checkpoint.tensors if ".vision_tower.timm_model." in name}
    assert tower
    grouped = {layer.tensor for layer in find_layers(checkpoint).grouped_layers}
    assert grouped
    assert not tower & grouped


def test_every_family_with_rules_is_on_the_page_and_passes() -> None:
    assert [name for name in FUSION_RULES if RESULTS.get(name, "passes") != "passes"] == []


def _ruled(result: str) -> list[str]:
    return [name for name, found in RESULTS.items() if found == result and name in FUSION_RULES]
