"""Constraints on layers, exclusions and their selectors, as commands take and show them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import DEMO, Measured, ok, refused

from mofq import Choices, frontier, search
from mofq.api import Budget
from mofq.decision.recipe import load_recipe

FIRST = tuple(f"layers.0.{kind}" for kind in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"))


def schemes(recipe: Path) -> dict[str, str]:
    return load_recipe(recipe).scheme_of_group


def test_a_search_goes_around_what_is_fixed_and_says_what_that_costs(
    measured: Measured, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    fixed = ("--fix", "first:1=bf16", "--at-least", "mlp.down=6")
    asked = ("search", measured.table, "--max-bits", "8", *fixed, "-o", recipe)
    content = ok(*asked, "--explain", "layers.0.attn.o", "--json").json
    found = schemes(recipe)
    assert {found[name] for name in FIRST} == {"bf16"}
    free = ok(*asked[:4], "-o", tmp_path / "free.yaml", "--json").json
    assert schemes(tmp_path / "free.yaml")[FIRST[0]] != "bf16"
    cost = content["error"] - free["error"]
    assert f"The constraints cost {cost:.3g} ± " in content["notes"][-1]
    assert f" ({100 * cost / free['error']:.0f} %)" in content["notes"][-1]
    (explained,) = content["explained"]
    assert set(explained["rejected"].values()) == {"--fix first:1=bf16"}
    noted = load_recipe(recipe).made_by["constraints"]
    assert noted == "fixed first:1=bf16; at_least mlp.down=6"
    assert [(one["layers"], one["groups"]) for one in content["selections"]] == [(7, 4), (6, 6)]
    shown = ok(*asked).err
    assert (
        "--fix first:1=bf16: 7 layers in 4 fusion groups.\n--at-least mlp.down=6: 6 layers" in shown
    )
    assert "The constraints cost" in shown


def test_python_gives_the_same_constraints_as_a_mapping(measured: Measured) -> None:
    choices = Choices(fixed={"first:1": "bf16"}, at_least={"mlp.down": 6})
    found = search(measured.table, budget=Budget(max_bits=8), choices=choices).recipe
    assert found.made_by["constraints"] == "fixed first:1=bf16; at_least mlp.down=6"
    same = Choices(fixed=["first:1=bf16"], at_least=["mlp.down=6.0"])
    assert search(measured.table, budget=Budget(max_bits=8), choices=same).recipe == found
    least = frontier(measured.table, choices=choices).points[0]
    assert least.bits_per_weight > frontier(measured.table).points[0].bits_per_weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fix", "last=bf16"), "--fix last=bf16 matches no layer. Write last:1 for the last"),
        (("--fix", "*.layer.0.*=bf16"), "nearest names are 'model.layers.0."),
        (("--fix", "first:1"), "--fix first:1: write LAYERS=VALUE"),
        (("--at-most", "attn.*=1"), "`--at-most attn.*=1` leaves no scheme to layers.0.attn.qkv"),
        (
            ("--fix", "first:1=bf16", "--at-most", "*=9"),
            "`--fix first:1=bf16` and `--at-most *=9` contradict each other",
        ),
        (("--fix", "*=bf16"), "the smallest possible is 16 bits per weight."),
    ],
)
def test_constraints_that_cannot_be_kept_are_refused(
    measured: Measured, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    search = ("search", measured.table, "--max-bits", "5", "-o", tmp_path / "recipe.yaml")
    assert message in refused(*search, *options)


@pytest.mark.long
def test_a_space_that_is_measured_into_a_table_of_others_keeps_its_exclusions(
    measured: Measured, tmp_path: Path
) -> None:
    table, recipe = tmp_path / "table.jsonl", tmp_path / "recipe.yaml"
    shutil.copy(measured.table, table)
    keep = tmp_path / "keep.yaml"
    plain = (measured.folder / "space.yaml").read_text("utf-8")
    keep.write_text(f"{plain}\nexclude: ['*.layers.0.*']\n", encoding="utf-8")
    measure = ("measure", DEMO, "--space", keep, "--stats", measured.stats, "-o", table)
    matched = "search space keep: exclude *.layers.0.*: 7 layers in 4 fusion groups."
    assert matched in ok(*measure).err
    assert matched in ok("inspect", DEMO, "--space", keep).err
    selections = ok("inspect", DEMO, "--space", keep, "--json").json["selections"]
    assert [(one["layers"], one["groups"]) for one in selections] == [(7, 4)]
    search = ("search", table, "--max-bits", "8", "-o", recipe)
    ok(*search, "--space", "keep")
    assert {schemes(recipe)[name] for name in FIRST} == {"bf16"}
    ok(*search, "--space", "space")
    assert "bf16" not in {schemes(recipe)[name] for name in FIRST}
    before = table.read_bytes()
    keep.write_text(f"{plain}\nexclude: ['*.layers.1.*']\n", encoding="utf-8")
    assert "another definition of the search space 'keep'" in refused(*measure)
    keep.write_text(f"{plain}\nexclude: ['*.layer.1.*']\n", encoding="utf-8")
    for command in (measure, ("inspect", DEMO, "--space", keep)):
        assert "exclude *.layer.1.* matches no layer" in refused(*command)
    run = ("run", DEMO, "--space", keep, "--max-bits", "9", "-o", tmp_path / "run")
    assert "exclude *.layer.1.* matches no layer" in refused(*run)
    assert table.read_bytes() == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fix", "*.layer.0.*=bf16"), "--fix *.layer.0.*=bf16 matches no layer."),
        (("--fix", "first:1"), "--fix first:1: write LAYERS=VALUE"),
        (("--at-most", "attn.*=1"), "`--at-most attn.*=1` leaves no scheme to layers.0.attn.qkv"),
        (("--at-least", "*=8"), "Without it the budgets can be met: `--at-least *=8`."),
        (("--objective", "best"), "--objective best: unknown."),
        (
            ("--objective", "worst-corpus", "--corpus-weights", "en=2,pt=1"),
            "--corpus-weights is of the mean over corpora. Leave it or --objective worst-corpus ",
        ),
    ],
)
def test_run_refuses_constraints_before_anything_is_run(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    folder = tmp_path / "run"
    run = ("run", DEMO, "--space", "serving", "--max-bits", "5", "-o", folder)
    assert message in refused(*run, *options)
    assert not folder.exists()


@pytest.mark.long
def test_a_run_goes_around_what_is_fixed_beside_the_run_that_does_not(tmp_path: Path) -> None:
    folder, space = tmp_path / "run", tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [int4.g64, int8.channel]\n")
    small = ("--sequences", "4", "--sequence-length", "64", "--tokens", "256", "--effort", "quick")
    run = ("run", DEMO, "--space", space, "--max-bits", "6", *small, "-o", folder)
    fixed = ("--fix", "first:1=int8.channel")
    ok(*run)
    ran = ok(*run, *fixed)
    assert "--fix first:1=int8.channel: 7 layers in 4 fusion groups." in ran.err
    assert "--fix first:1=int8.channel" in ran.err.rpartition("Next: mofq explore ")[2]
    plain, other = folder / "recipe.yaml", folder / "recipe-6.0bits-fixed-first-1=int8.channel.yaml"
    assert {schemes(other)[name] for name in FIRST} == {"int8.channel"}
    assert {schemes(plain)[name] for name in FIRST} != {"int8.channel"}
    assert load_recipe(other).made_by["constraints"] == "fixed first:1=int8.channel"
    found = load_recipe(folder / "recipe.yaml").made_by.get("constraints")
    assert found is None
    before = sorted(folder.iterdir())
    ok(*run, *fixed)
    assert sorted(folder.iterdir()) == before
    ok(*run, "--objective", "worst-corpus")
    assert (folder / "recipe-6.0bits-worst-corpus.yaml").is_file()
