"""Names in exported mixtures against what engines read of them: ``mofq/engines/facts/loading``.

The facts were made by letting the engines build the models and load the exports
(`scripts/engines/README.md`). An export whose names, shapes or config are others than then is one
that no loader has read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from families import long_but
from loading_cases import (
    CHOICES,
    VARIANTS,
    digest,
    each,
    export_choice,
    merged,
    scheme_of,
    write_variant,
)

import mofq.engines
from mofq.engines import find_engine, legality, model_problem
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.schemes import parse_scheme
from scripts.engines.loading import outcome

FACTS = sorted((Path(mofq.engines.__file__).parent / "facts" / "loading").glob("*.json"))

#: Parameters that a checkpoint need not have: scales of queries and of the cache, which start at 1,
#: and the order of activations, which is not read where the config asks for none.
NOT_STORED = re.compile(
    r".*\.attn\.[qkv]_(scale|zero_point)|.*\.w(13|2)_(weight_g_idx|g_idx_sort_indices)"
)


class Unloadable(NamedTuple):
    """Exports that an engine cannot load under any name: regular expressions."""

    facts: str
    variant: str
    choice: str
    error: str
    why: str


UNLOADABLE = (
    Unloadable(
        r"sglang-.*",
        r"qwen[23]_moe with a dense layer",
        r".*",
        r"Unable to find matching target for model\.layers\.1\.mlp\.experts|^unread",
        "SGLang takes every decoder layer for one of experts, whatever mlp_only_layers says",
    ),
    Unloadable(
        r"sglang-.*",
        r"glm4_moe",
        r"int4\.g32|int4\.g32 beside experts|nvfp4",
        r"'MergedColumnParallelLinear' object has no attribute 'weight'",
        "SGLang asks shared experts for a weight, which packed ones have under another name",
    ),
    Unloadable(
        r"sglang-.*",
        r"deepseek_v3",
        r"int4\.g32|int4\.g32 beside experts|static fp8|nvfp4",
        r"param\.shape=torch\.Size\(\[[12]\]\)",
        "SGLang concatenates whatever q_a_proj and kv_a_proj_with_mqa store, scales of tensors too",
    ),
)


def read_facts(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Variant and choice -> row."""
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {(row["variant"], row["choice"]): row for row in rows}


def names_read(row: dict[str, Any]) -> set[str]:
    """The tensors that went into a parameter."""
    found = set()
    for line in row["read"]:
        found |= {name for names in line.partition(" <- ")[2].split() for name in each(names)}
    return found


def problem_of(row: dict[str, Any]) -> str:
    """Why an export was not loaded whole, or nothing."""
    unfilled = [name for name in row.get("unfilled", ()) if not NOT_STORED.fullmatch(name)]
    if "error" in row:
        return str(row["error"])
    if row["unread"]:
        return f"unread: {row['unread']}"
    return f"unfilled: {unfilled}" if unfilled else ""


def problems(path: Path) -> list[tuple[str, str, str, str]]:
    """Facts, variant, choice and problem of every export that was not loaded whole."""
    found = [(path.stem, *key, problem_of(row)) for key, row in read_facts(path).items()]
    return [one for one in found if one[-1]]


def covers(excuse: Unloadable, facts: str, variant: str, choice: str, problem: str) -> bool:
    """Whether an engine's limit is known."""
    is_meant = all(map(re.fullmatch, excuse[:3], (facts, variant, choice)))
    return is_meant and re.search(excuse.error, problem) is not None


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_loaders_read_every_tensor_and_fill_every_parameter(path: Path) -> None:
    assert read_facts(path).keys() == {(v, c) for v in VARIANTS for c in CHOICES}
    wrong = [one for one in problems(path) if not any(covers(e, *one) for e in UNLOADABLE)]
    assert wrong == []


def test_every_limit_of_an_engine_was_met() -> None:
    found = [one for path in FACTS for one in problems(path)]
    assert [e for e in UNLOADABLE if not any(covers(e, *one) for one in found)] == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", long_but(VARIANTS, "mixtral"))
def test_an_export_is_the_one_that_the_loaders_read(
    tmp_path: Path, variant: str, fused: bool
) -> None:
    model = write_variant(variant, tmp_path / "model", fused=fused)
    for choice in CHOICES:
        exported = export_choice(model, choice, tmp_path / choice)
        for path in FACTS:
            row = read_facts(path)[variant, choice]
            if "read" in row and not row["unread"]:
                assert set(exported.tensors) == names_read(row), f"{path.stem}, {choice}"
            assert digest(exported) == row["export"], (
                f"{choice}: the config, a dtype or a shape is another than {path.stem} loaded; run"
                f" `python -m scripts.engines.loading {path.stem.replace('-', '==')}`"
            )


@pytest.mark.parametrize("variant", long_but(VARIANTS, "glm4_moe"))
def test_what_an_engine_cannot_load_is_refused_and_what_it_loads_is_not(
    tmp_path: Path, variant: str
) -> None:
    layers = find_layers(open_checkpoint(str(write_variant(variant, tmp_path / "model"))))
    for path in FACTS:
        family, version = path.stem.rsplit("-", 1)
        engine = f"{family}-hopper@{version}"
        legal = legality(engine, layers.architecture)
        whole = model_problem(find_engine(engine), layers.architecture, layers.groups)
        for choice in CHOICES:
            schemes = {group: parse_scheme(scheme_of(choice, group)) for group in layers.groups}
            reasons = [whole, *(legal(scheme, group) for group, scheme in schemes.items())]
            # Tiny layers are refused for their sizes too, and NVFP4 inputs before Blackwell.
            of_loading = [reason for reason in reasons if reason and "srt/models/" in reason]
            is_loaded = not problem_of(read_facts(path)[variant, choice])
            assert is_loaded == (not of_loading), f"{path.stem}, {choice}: {reasons}"


def test_a_renamed_expert_and_a_router_under_another_name_are_unread() -> None:
    answer = {
        "read": {f"model.layers.0.mlp.experts.{e}.w1.weight": ["w13"] for e in range(3)},
        "unread": ["model.layers.0.mlp.gate.weight"],
        "unfilled": ["w13"],
    }
    row = outcome(answer)
    assert row["read"] == ["w13 <- model.layers.{0}.mlp.experts.{0,1,2}.w1.weight"]
    assert problem_of(row) == "unread: ['model.layers.{0}.mlp.gate.weight']"
    assert problem_of({**row, "unread": []}) == "unfilled: ['w13']"


def test_merged_names_are_taken_apart_again() -> None:
    names = [f"model.layers.0.experts.{e}.{word}" for e in (0, 1, 10) for word in ("w1", "w2")]
    one = [*names, "model.norm.weight"]
    assert sorted(name for line in merged(one, "experts") for name in each(line)) == sorted(one)
