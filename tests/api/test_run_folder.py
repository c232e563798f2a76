"""The names that results of a run have in its folder."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from explore_tables import write_explore_table
from safetensors.torch import save

from mofq.api.options import Choices
from mofq.api.request import make_request
from mofq.api.run_folder import NotedRequest, RunFiles, find_files
from mofq.decision.recipe import Recipe, RecipeGroup, RecipeResult, write_recipe
from mofq.decision.tuning import Tuning, tuned_file
from mofq.evidence.spaces import parse_search_space
from mofq.evidence.table import TableSpace, open_table, read_table
from mofq.exceptions import MofqError

FIRST = NotedRequest({"bits_per_weight": 5.0}, "vllm-cpu", "serving", "a" * 64, None)
SPACE = TableSpace("serving", "a" * 64, ("int4.g64",), (), 1.0, "vllm-cpu", "0.1.0")
RECIPE = Recipe(
    "org/model",
    None,
    (RecipeGroup("mlp.down", "int4.g64", ("mlp.down_proj",)),),
    made_by={"engine": "vllm-cpu", "space": "serving", "space_sha256": "a" * 64},
    budget={"bits_per_weight": 5.0},
    result=RecipeResult(bits_per_weight=4.25),
)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with the table and the recipe of `FIRST`."""
    path = write_explore_table(tmp_path / "table.jsonl", decoder_layers=1)
    with open_table(path, read_table(path).header) as table:
        table.add_space(SPACE)
    write_recipe(RECIPE, tmp_path / "recipe.yaml")
    (tmp_path / "validation.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({}, []),
        ({"space_sha256": None}, []),  # of a version that did not note it
        ({"budget": {"kl_nats_per_token": 0.02}}, ["0.02nats"]),
        ({"budget": {"checkpoint_bytes": 5, "finer_fraction": 0.1}}, ["5B", "0.1finer"]),
        ({"budget": {}}, ["no-budget"]),
        ({"engine": "vllm-hopper:tp=2"}, ["5.0bits", "vllm-hopper-tp=2"]),
        ({"engine": None}, ["5.0bits", "no-engine"]),
        ({"space": "w8a8", "space_sha256": "b" * 64}, ["5.0bits", "w8a8"]),
        ({"corpus_weights": "en=3,pt=1"}, ["5.0bits", "en=3,pt=1"]),
        ({"objective": "worst-corpus"}, ["5.0bits", "worst-corpus"]),
        ({"constraints": ("at_least *.o_proj=8",)}, ["5.0bits", "at-least--.o-proj=8"]),
        ({"space": "a/b", "engine": "e"}, ["5.0bits", "e", "a-b"]),
        ({"effort": "best", "space_sha256": "b" * 64}, ["5.0bits", "best"]),
    ],
)
def test_a_request_is_named_by_what_sets_it_apart(
    changed: dict[str, object], parts: list[str]
) -> None:
    assert replace(FIRST, **changed).differences_from(FIRST) == parts  # type: ignore[arg-type]


def test_constraints_that_are_long_in_words_are_named_by_their_hash() -> None:
    many = replace(FIRST, constraints=tuple(f"fixed layers.{n}.attn.o=bf16" for n in range(3)))
    _, part = many.differences_from(FIRST)
    assert re.fullmatch("constraints-[0-9a-f]{8}", part)
    assert FIRST.differences_from(many) == ["5.0bits", "no-constraints"]


def test_constraints_of_a_recipe_are_those_of_its_space_and_request_in_any_order() -> None:
    text = "version: 1\nschemes: [int4.g64, int8.g64]\nat_least: {'attn.*': 8}\n"
    space = parse_search_space(text, name="serving", where="s")
    choices = Choices(fixed={"first:1": "bf16"}, at_least={"attn.*": 8})
    asked = NotedRequest.of_request(make_request(choices), space)
    noted = "fixed first:1=bf16; at_least attn.*=8"
    assert asked.constraints == ("at_least attn.*=8", "fixed first:1=bf16")
    assert NotedRequest.of_recipe(replace(RECIPE, made_by={"constraints": noted})).constraints == (
        asked.constraints
    )


def test_a_space_has_changed_where_its_name_is_the_same_and_its_hash_is_not() -> None:
    assert replace(FIRST, space_sha256="b" * 64).has_changed_space(FIRST)
    assert not replace(FIRST, space_sha256="b" * 64, space="w8a8").has_changed_space(FIRST)
    assert not replace(FIRST, space_sha256=None).has_changed_space(FIRST)


def test_a_space_with_fitted_twins_is_no_other_space_than_its_own() -> None:
    text = "version: 1\nschemes: [int4.g64]\n"
    space = parse_search_space(text, name="serving+fitted", where="s")
    asked = NotedRequest.of_request(make_request(Choices(space=space.name)), space, effort="normal")
    assert asked.space == "serving"
    assert not asked.has_changed_space(replace(FIRST, effort="quick"))
    assert asked.has_changed_space(replace(FIRST, effort="best"))
    noted = {"space": "serving+fitted", "space_sha256": space.sha256, "effort": "normal"}
    assert NotedRequest.of_recipe(replace(RECIPE, made_by=noted)).space == "serving"
    assert "effort normal" in str(asked)


def test_the_first_request_has_the_plain_names() -> None:
    plain, other = RunFiles(Path("run")), RunFiles(Path("run"), "-5.0bits")
    assert (plain.recipe, plain.model) == (Path("run/recipe.yaml"), Path("run/model"))
    assert other.recipe == Path("run/recipe-5.0bits.yaml")
    assert other.validation == Path("run/validation-5.0bits.json")
    assert other.model == Path("run/model-5.0bits")
    assert other.named("torchao.json") == Path("run/torchao-5.0bits.json")
    assert plain.table == other.table


def test_a_folder_is_continued_in_its_search_space_with_more_schemes_alone(finished: Path) -> None:
    plain, asked = RunFiles(finished), replace(FIRST, space_sha256="b" * 64)
    assert find_files(finished, FIRST, SPACE) == plain
    grown = replace(SPACE, sha256="b" * 64, schemes=("int4.g64", "int4.g32"))
    assert find_files(finished, asked, grown) == plain
    for other in (replace(grown, min_gain=2.0), replace(grown, schemes=("int4.g32",))):
        with pytest.raises(MofqError, match=r"recipe\.yaml: was decided in the search space serv"):
            find_files(finished, asked, other)


@pytest.mark.parametrize("name", ["recipe.yaml", "model/recipe.yaml"])
def test_a_recipe_that_was_edited_is_refused_before_anything_is_run(
    name: str, finished: Path
) -> None:
    other = replace(FIRST, budget={"bits_per_weight": 6.0})
    path = finished / name
    path.parent.mkdir(exist_ok=True)
    text = (finished / "recipe.yaml").read_text("utf-8")
    path.write_text(text.replace("int4.g64", "int4.g32"))
    with pytest.raises(MofqError, match=rf"{name}: was edited after it was found, and .* move rec"):
        find_files(finished, FIRST, SPACE)
    assert find_files(finished, other, SPACE).suffix == "-6.0bits"


def test_a_recipe_that_was_tuned_after_its_model_was_exported_is_refused(finished: Path) -> None:
    content = save({"norm.weight": torch.ones(4)})
    sha256 = hashlib.sha256(content).hexdigest()
    tuning = Tuning(
        file=tuned_file(sha256),
        sha256=sha256,
        decisions_sha256=RECIPE.decisions_sha256,
        mofq="0.1.0",
        tensors=1,
        steps=16,
        sequences=24,
        sequence_length=512,
        bos=False,
        corpora_sha256="a" * 16,
        held_out=8,
        kl_before=0.2,
        kl_after=0.1,
        kl_saved_stderr=0.01,
    )
    tuned = replace(RECIPE, weights_sha256="a" * 64, tuning=tuning, tuned=content)
    (finished / "model").mkdir()
    write_recipe(RECIPE, finished / "model/recipe.yaml")
    write_recipe(tuned, finished / "recipe.yaml")
    with pytest.raises(MofqError, match=r"recipe\.yaml: was tuned otherwise than .*model, or"):
        find_files(finished, FIRST, SPACE)
    write_recipe(tuned, finished / "model/recipe.yaml")
    assert find_files(finished, FIRST, SPACE).suffix == ""


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [
        ("en=3,pt=1", "en=3,pt=1"),
        ("pt=2,en=6.0", "en=3,pt=1"),
        ("en=0.3,pt=0.1", "en=3,pt=1"),
        ("pt=0,en=0.5", "en=1,pt=0"),
        ("en=2,pt=2", None),
        (None, None),
    ],
)
def test_weights_of_corpora_that_mean_the_same_are_one_request(
    spelled: str | None, meant: str | None
) -> None:
    request = make_request(Choices(corpus_weights=spelled))
    space = parse_search_space("version: 1\nschemes: [int4.g64]", name="s", where="s")
    assert NotedRequest.of_request(request, space).corpus_weights == meant
    made_by = {} if spelled is None else {"corpus_weights": spelled}
    assert NotedRequest.of_recipe(replace(RECIPE, made_by=made_by)).corpus_weights == meant


@pytest.mark.parametrize("earlier", [None, 3])
def test_a_table_of_other_numerics_is_refused_before_anything_is_run(
    finished: Path, earlier: int | None
) -> None:
    path = finished / "table.jsonl"
    header = replace(read_table(path).header, numerics=earlier)
    path.unlink()
    with open_table(path, header):
        pass
    said = rf"numerics {earlier or re.escape('(not noted)')}, and this .* another output"
    with pytest.raises(MofqError, match=said):
        find_files(finished, FIRST, SPACE)
