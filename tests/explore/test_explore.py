"""The explorer page, as far as it shows without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from explore_pages import data_of, recipe_texts
from explore_tables import SCHEMES, STATIC, WALL_HEIGHT, write_explore_table
from typer.testing import CliRunner

from mofq.cli.commands import app
from mofq.decision import Budgets, Request, decide, request_problem, solve_frontier
from mofq.decision.model_error import row_error
from mofq.decision.recipe import RecipeResult, write_recipe
from mofq.evidence.constraints import parse_constraint
from mofq.evidence.table import Extent, Profile, Table, read_table
from mofq.exceptions import MofqError, RecipeError
from mofq.explore.channel_profiles import profile_data
from mofq.explore.drawing import read_drawing
from mofq.explore.frontier_recipes import spaced_points
from mofq.explore.html_page import page_html, write_page

HOSTILE = "<script>alert(1)</script>."
HOSTILE_MODEL = '<img src=x onerror=alert(1)>&"{{script}} {{data}}'
_FORBIDDEN = re.compile(r"https?:|//[a-z]|@import|url\(", re.IGNORECASE)


class Page(HTMLParser):
    """Tags and the texts of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            number = len(self.tags) - 1
            self.texts[number] = self.texts.get(number, "") + data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, self.texts.get(number, ""))
            for number, (name, attributes) in enumerate(self.tags)
            if name == tag
        ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_explore_table(tmp_path_factory.mktemp("explore") / "table.jsonl")


@pytest.fixture(scope="module")
def table(path: Path) -> Table:
    return read_table(path)


@pytest.fixture(scope="module")
def data(table: Table, path: Path) -> dict[str, Any]:
    return data_of(table, path)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("hostile") / "a b<b>.jsonl"
    write_explore_table(path, decoder_layers=1, prefix=HOSTILE, model=HOSTILE_MODEL)
    return data_of(read_table(path), path)


def test_every_recipe_of_the_page_is_byte_for_byte_what_its_command_writes(
    data: dict[str, Any], tmp_path: Path
) -> None:
    for point, text in list(zip(data["points"], recipe_texts(data), strict=True))[::5]:
        output = tmp_path / "recipe.yaml"
        command = shlex.split(point["command"])
        assert command[0] == "mofq"
        assert command[-2:] == ["-o", "recipe.yaml"]
        result = CliRunner().invoke(app, [*command[1:-1], str(output)])
        assert result.exit_code == 0, result.output
        assert output.read_bytes() == text.encode()


def test_the_bits_of_a_command_are_the_size_of_its_recipe_to_the_last_digit(
    data: dict[str, Any], table: Table
) -> None:
    for point in data["points"]:
        command = shlex.split(point["command"])
        bits = float(command[command.index("--max-bits") + 1])
        assert bits == 8 * point["bytes"] / table.header.weights == point["bits_per_weight"]


def test_recipes_with_static_activations_are_put_together_too(data: dict[str, Any]) -> None:
    assert any("static_amax:" in text for text in recipe_texts(data))
    assert any(STATIC in text for text in recipe_texts(data))


def test_points_grow_in_size_and_each_is_the_optimum_of_its_size(
    data: dict[str, Any], table: Table
) -> None:
    sizes = [point["bytes"] for point in data["points"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 10
    for point in data["points"][::7]:
        request = Request(Budgets(max_bits=point["bits_per_weight"]), ties=False)
        assert decide(table, request).recipe.result.error == point["error"]


def test_a_long_frontier_is_thinned_and_keeps_both_ends(table: Table) -> None:
    frontier = solve_frontier(request_problem(table))
    points = spaced_points(frontier, 8)
    assert len(points) <= 8
    assert (points[0], points[-1]) == (0, len(frontier.bytes_K) - 1)
    assert list(points) == sorted(set(points))


def test_the_page_holds_all_groups_options_and_uniform_schemes(data: dict[str, Any]) -> None:
    assert len(data["groups"]) == 12
    assert all(len(group["options"]) == len(SCHEMES) for group in data["groups"])
    uniforms = [one["label"] for one in data["references"] if one["kind"] == "uniform"]
    assert set(uniforms) == set(SCHEMES)
    assert data["row_error"]["spread"] == row_error().spread
    assert data["groups"][5]["module"] == "attn.o"
    assert data["groups"][5]["decoder_layer"] == 1
    assert data["groups"][5]["rejected"] == [["int4.g512", "256 is not divisible by 512"]]
    assert data["schemes"][-1] == {
        "name": "bf16",
        "element": "bf16",
        "line": "    scheme: bf16\n",
        "number": None,
        "weight": None,
        "activation": None,
    }
    numbers = {one["name"]: (one["number"], one["weight"]) for one in data["schemes"]}
    assert numbers["fp4_e2m1.g32"] == ("FP", "g32")
    assert numbers["int8.channel"] == ("INT", "channel")


def test_what_greedy_chooses_at_the_size_of_a_uniform_scheme_is_a_point(
    data: dict[str, Any], table: Table
) -> None:
    [greedy] = [one for one in data["references"] if one["kind"] == "greedy"]
    recipe = decide(table, Request(Budgets(max_bits=4.5), solver="greedy", ties=False)).recipe
    names = [data["schemes"][scheme]["name"] for scheme in greedy["schemes"]]
    assert names == [group.scheme for group in recipe.groups]
    assert greedy["bits_per_weight"] == recipe.bits_per_weight == pytest.approx(4.5, abs=2e-4)
    assert greedy["label"] == "greedy, 4.50 bits"


def test_a_uniform_scheme_around_constraints_is_no_point_of_greedy_too(
    table: Table, path: Path
) -> None:
    fixed = parse_constraint("fixed", "first:1", "bf16", where="test")
    references = data_of(table, path, request=Request(Budgets(), constraints=(fixed,)))[
        "references"
    ]
    uniforms = [one["schemes"] for one in references if one["kind"] == "uniform"]
    assert any(len(set(schemes)) > 1 for schemes in uniforms)
    greedy = [one["schemes"] for one in references if one["kind"] == "greedy"]
    assert not [schemes for schemes in greedy if schemes in uniforms]


def test_profiles_are_in_the_page_to_one_step_of_their_scale(
    data: dict[str, Any], table: Table
) -> None:
    for group in data["groups"]:
        profiles = [one for one in table.profiles if one.group == group["name"]]
        assert [layer[0] for layer in group["profile"]["layers"]] == [
            one.module for one in profiles
        ]
        for (_, channels, extent, number), profile in zip(
            group["profile"]["layers"], profiles, strict=True
        ):
            assert channels == profile.channels == 256
            assert magnitudes(extent, "amax") == pytest.approx(profile.weight.amax, rel=0.02)
            assert magnitudes(extent, "rms") == pytest.approx(profile.weight.rms, rel=0.02)
            inputs = group["profile"]["inputs"][number]["en"]
            assert magnitudes(inputs, "amax") == pytest.approx(profile.inputs["en"].amax, rel=0.02)


def magnitudes(extent: dict[str, Any], name: str) -> list[float]:
    ratio = extent["most"] / extent["least"]
    return [extent["least"] * ratio ** (step / 255) for step in base64.b64decode(extent[name])]


def test_a_wall_is_a_channel_far_above_the_typical_one(data: dict[str, Any]) -> None:
    walls = {g["name"]: g["profile"]["layers"][0][2]["wall"] for g in data["groups"]}
    assert walls["layers.0.attn.qkv"] == pytest.approx(WALL_HEIGHT, rel=0.3)
    assert max(wall for name, wall in walls.items() if name != "layers.0.attn.qkv") < 2


def test_layers_that_read_the_same_inputs_share_them_in_the_page() -> None:
    one = Extent((1.0, 0.0), (0.5, 0.0), {"g16": 2.0})
    other = Extent((2.0, 1.0), (1.0, 1.0), {})
    profiles = [
        Profile("g", "q", 2, one, {"en": other}),
        Profile("g", "k", 2, other, {"en": other}),
        Profile("g", "o", 2, other, {"en": one}),
    ]
    found = profile_data(profiles)
    assert [layer[3] for layer in found["layers"]] == [0, 0, 1]
    assert len(found["inputs"]) == 2
    zeros = Extent((0.0,), (0.0,), {})
    [[_, _, extent, _]] = profile_data([Profile("g", "q", 1, zeros, {})])["layers"]
    assert (extent["most"], extent["wall"]) == (0.0, 1.0)


def test_several_corpora_say_what_each_alone_would_choose(tmp_path: Path) -> None:
    path = write_explore_table(tmp_path / "t.jsonl", decoder_layers=1, corpora=("en", "pt"))
    data = data_of(read_table(path), path)
    assert set(data["corpus_best"]) == {"en", "pt"}

    def error(choice: list[int], corpus: int) -> float:
        pairs = zip(choice, data["groups"], strict=True)
        return sum(group["options"][option][2][corpus] for option, group in pairs)

    better = 0
    for name, corpus in (("en", 0), ("pt", 1)):
        for best, point in zip(data["corpus_best"][name], data["points"], strict=True):
            assert error(best, corpus) <= error(point["choice"], corpus)
            assert sum_of_bytes(data, best) <= sum_of_bytes(data, point["choice"])
            better += error(best, corpus) < error(point["choice"], corpus)
    assert better > 0


def sum_of_bytes(data: dict[str, Any], choice: list[int]) -> int:
    pairs = zip(choice, data["groups"], strict=True)
    return sum(group["options"][option][1] for option, group in pairs)


def test_no_name_of_a_table_becomes_markup(hostile: dict[str, Any]) -> None:
    page = page_html(hostile)
    assert HOSTILE not in page
    assert "<img" not in page
    parsed = Page(page)
    assert [attributes.get("type") for attributes, _ in parsed.of("script")] == [
        "application/json",
        None,
    ]
    assert json.loads(parsed.of("script")[0][1]) == json.loads(json.dumps(hostile))
    assert parsed.of("title")[0][1] == f"{HOSTILE_MODEL} · mofq"


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(
    data: dict[str, Any],
) -> None:
    parsed = Page(page_html(data))
    meta = next(a for a, _ in parsed.of("meta") if "http-equiv" in a)
    policy = dict(part.split(" ", 1) for part in str(meta["content"]).split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in str(meta["content"])
    for name, text in (("script-src", parsed.of("script")[1][1]), ("style-src", style(parsed))):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"


def style(parsed: Page) -> str:
    [(_, text)] = parsed.of("style")
    return text


def test_the_page_refers_to_nothing_outside_of_itself(data: dict[str, Any]) -> None:
    parsed = Page(page_html(data))
    links = [a for tag, a in parsed.tags for name in ("src", "href") if name in a]
    assert links == [{"rel": "icon", "href": "data:,"}]
    assert not _FORBIDDEN.search(style(parsed))
    assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]


def test_the_library_in_the_page_is_the_one_whose_licence_is_beside_it(
    data: dict[str, Any],
) -> None:
    script = Page(page_html(data)).of("script")[1][1]
    assert "uPlot (v1.6.32)" in script
    vendor = Path(__file__).parent.parent.parent / "mofq/explore/page/vendor"
    digest = hashlib.sha256((vendor / "uPlot.iife.min.js").read_bytes()).hexdigest()
    assert digest == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert "MIT" in (vendor / "uPlot-LICENSE.txt").read_text("utf-8")


def test_a_recipe_to_compare_is_predicted_from_the_table(
    table: Table, path: Path, tmp_path: Path
) -> None:
    recipe = decide(table, Request(Budgets(max_bits=5.0), ties=False)).recipe
    write_recipe(recipe, tmp_path / "mine.yaml")
    data = data_of(table, path, recipes=[tmp_path / "mine.yaml"])
    point = data["references"][-1]
    assert (point["kind"], point["label"]) == ("recipe", "mine.yaml")
    assert point["bits_per_weight"] == recipe.result.bits_per_weight
    names = [data["schemes"][scheme]["name"] for scheme in point["schemes"]]
    assert names == [group.scheme for group in recipe.groups]


def test_a_recipe_that_the_drawing_does_not_offer_is_predicted_on_all_rows(
    table: Table, tmp_path: Path
) -> None:
    recipe = decide(table, Request(Budgets(max_bits=4.5), ties=False)).recipe
    other = replace(recipe, made_by={}, result=RecipeResult())
    write_recipe(other, tmp_path / "mine.yaml")
    fixed = Request(Budgets(), constraints=(parse_constraint("fixed", "*", "bf16", where="here"),))
    (point,) = read_drawing(table, recipes=[tmp_path / "mine.yaml"], request=fixed).recipes
    assert point.bits_per_weight == recipe.bits_per_weight
    assert point.value == recipe.kl_nats_per_token


def test_a_recipe_for_other_weights_of_corpora_is_predicted_with_those_of_the_drawing(
    tmp_path: Path,
) -> None:
    path = write_explore_table(tmp_path / "t.jsonl", decoder_layers=1, corpora=("en", "pt"))
    table, mine = read_table(path), tmp_path / "mine.yaml"
    request = Request(Budgets(max_bits=5.0), corpus_weights={"en": 1, "pt": 0}, ties=False)
    recipe = decide(table, request).recipe
    write_recipe(recipe, mine)
    write_recipe(replace(recipe, made_by={}, result=RecipeResult()), tmp_path / "bare.yaml")
    drawn, bare = read_drawing(table, recipes=[mine, tmp_path / "bare.yaml"]).recipes
    assert drawn.value == bare.value != recipe.kl_nats_per_token
    (same,) = read_drawing(table, recipes=[mine], request=request).recipes
    assert same.value == recipe.kl_nats_per_token


def test_a_recipe_of_another_model_is_refused(table: Table, path: Path, tmp_path: Path) -> None:
    recipe = decide(table, Request(Budgets(max_bits=5.0))).recipe
    write_recipe(replace(recipe, index_sha256="e" * 64), tmp_path / "other.yaml")
    with pytest.raises(RecipeError, match=r"other\.yaml: was made for .* e{64}.* a{64}"):
        data_of(table, path, recipes=[tmp_path / "other.yaml"])
    write_recipe(replace(recipe, groups=recipe.groups[:-1]), tmp_path / "less.yaml")
    with pytest.raises(RecipeError, match=r"less\.yaml: has no fusion group .* layers\.2\.mlp"):
        data_of(table, path, recipes=[tmp_path / "less.yaml"])


VALIDATION = {
    "version": 1,
    "index_sha256": "a" * 64,
    "candidate": "some/recipe.yaml",
    "text": "demo-en",
    "bits_per_weight": 5.0,
    "kl_nats_per_token": 0.01,
    "kl_stderr": 0.001,
    "predicted_kl_nats_per_token": None,
}


def test_a_validation_gives_a_measured_point(table: Table, path: Path, tmp_path: Path) -> None:
    (tmp_path / "validation.json").write_text(json.dumps(VALIDATION))
    [point] = data_of(table, path, validations=[tmp_path / "validation.json"])["measured"]
    assert (point["label"], point["text"]) == ("recipe", "demo-en")
    assert (point["kl_nats_per_token"], point["kl_stderr"]) == (0.01, 0.001)
    assert point["predicted"] is None


def test_what_a_run_measured_in_several_validations_is_drawn_once(
    table: Table, path: Path, tmp_path: Path
) -> None:
    uniform = VALIDATION | {"candidate": "int4.g32@mse", "bits_per_weight": 4.5}
    for name, bits in (("one", 5.0), ("two", 6.0)):
        content = VALIDATION | {"candidate": f"{name}.yaml", "bits_per_weight": bits}
        content |= {"alternatives": {"int4.g32@mse": uniform}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    both = [tmp_path / "one.json", tmp_path / "two.json"]
    measured = data_of(table, path, validations=both)["measured"]
    assert [(one["label"], one["at"]) for one in measured] == [
        ("one", 5.0),
        ("int4.g32@mse", 4.5),
        ("two", 6.0),
    ]


def test_a_uniform_scheme_that_runs_measured_is_one_point_with_its_drawn_prediction(
    table: Table, path: Path, tmp_path: Path
) -> None:
    bits = {
        one["label"]: one["bits_per_weight"]
        for one in data_of(table, path)["references"]
        if one["kind"] == "uniform"
    }
    uniform = VALIDATION | {"candidate": "int4.g32", "bits_per_weight": bits["int4.g32"]}
    larger = uniform | {"candidate": "int4.g128", "bits_per_weight": bits["int4.g128"] + 0.5}
    for name, predicted in (("one", 0.02), ("two", 0.03)):
        content = VALIDATION | {"candidate": f"{name}.yaml"}
        measured = uniform | {"predicted_kl_nats_per_token": predicted}
        content |= {"alternatives": {"int4.g32": measured, "int4.g128": larger}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    both = [tmp_path / "one.json", tmp_path / "two.json"]
    data = data_of(table, path, validations=both)
    (mine,) = [one for one in data["measured"] if one["label"] == "int4.g32"]
    reference = data["references"][mine["reference"]]
    assert (reference["kind"], reference["label"]) == ("uniform", "int4.g32")
    assert (mine["predicted"], mine["at"]) == (reference["value"], reference["at"])
    (other,) = [one for one in data["measured"] if one["label"] == "int4.g128"]
    assert other["reference"] is None  # of other layers


def test_a_validation_is_of_the_recipe_of_its_text_else_of_its_name(
    table: Table, path: Path, tmp_path: Path
) -> None:
    files = []
    for folder, bits in (("small", 5.0), ("large", 6.0)):
        files.append(tmp_path / folder / "recipe.yaml")
        files[-1].parent.mkdir()
        write_recipe(decide(table, Request(Budgets(max_bits=bits))).recipe, files[-1])
    text = hashlib.sha256(files[1].read_bytes()).hexdigest()
    found = []
    for sha256 in (text, "0" * 64, None):
        (tmp_path / "validation.json").write_text(
            json.dumps(VALIDATION | {"recipe_sha256": sha256})
        )
        data = data_of(table, path, recipes=files, validations=[tmp_path / "validation.json"])
        place = data["measured"][0]["reference"]
        found.append(None if place is None else data["references"][place]["label"])
    assert found == ["large/recipe.yaml", None, "small/recipe.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "no validation of version 1"),
        ({"alternatives": []}, "alternatives must be a mapping"),
        ({"alternatives": {"int4": VALIDATION | {"version": 2}}}, "no validation of version 1"),
        ({"index_sha256": "f" * 64}, "f{64}.* a{64}"),
        ({"kl_nats_per_token": None}, "has no kl_nats_per_token"),
        ({"bits_per_weight": "many"}, "bits_per_weight must be a number"),
    ],
)
def test_a_validation_that_does_not_belong_is_refused(
    table: Table, path: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "validation.json").write_text(json.dumps(VALIDATION | change))
    with pytest.raises(MofqError, match=message):
        data_of(table, path, validations=[tmp_path / "validation.json"])


def test_a_page_too_large_for_mail_is_refused_and_leaves_nothing(
    data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(MofqError, match="more than 6,000,000"):
        write_page(data | {"model": "x" * 6_000_000}, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_page(path: Path, tmp_path: Path) -> None:
    output = tmp_path / "explorer.html"
    result = CliRunner().invoke(
        app, ["explore", str(path), "--space", "test", "-o", str(output), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == output.stat().st_size < 400_000
    page = json.loads(Page(output.read_text("utf-8")).of("script")[0][1])
    assert all(" --space test " in point["command"] for point in page["points"])


@pytest.mark.long
def test_a_page_keeps_constraints_and_says_which(table: Table, path: Path, tmp_path: Path) -> None:
    some = (parse_constraint("fixed", "first:1", "bf16", where=""),)
    data = data_of(table, path, request=Request(Budgets(), ties=False, constraints=some))
    assert data["constraints"] == ["fixed first:1=bf16"]
    first = [group for group in data["groups"] if group["decoder_layer"] == 0]
    assert {len(group["options"]) for group in first} == {1}
    assert ["int4.g32", "fixed first:1=bf16"] in first[0]["rejected"]
    assert ["int4.g512", "256 is not divisible by 512"] in first[0]["rejected"]
    point, text = data["points"][0], next(recipe_texts(data))
    command = shlex.split(point["command"])
    assert command[command.index("--fix") + 1] == "first:1=bf16"
    result = CliRunner().invoke(app, [*command[1:-1], str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "recipe.yaml").read_text("utf-8") == text
    assert data_of(table, path)["constraints"] == []
