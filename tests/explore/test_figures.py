"""Figures: each kind is drawn, from the same inputs to the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from explore_tables import write_explore_table
from typer.testing import CliRunner

from mofq.cli.commands import app
from mofq.decision import Budgets, Request, decide
from mofq.decision.recipe import write_recipe
from mofq.evidence.table import read_table
from mofq.exceptions import MofqError
from mofq.explore.drawing import Drawing, read_drawing
from mofq.explore.figures import FIGURES, draw_figure

#: A model's name is text, not a formula or markup.
MODEL = "a $b_c$ <model> & co"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    table = read_table(write_explore_table(folder / "table.jsonl", model=MODEL))
    write_recipe(decide(table, Request(Budgets(max_bits=5.0))).recipe, folder / "mine.yaml")
    validation = {
        "version": 1,
        "index_sha256": "a" * 64,
        "candidate": "mine.yaml",
        "text": "demo-en",
        "bits_per_weight": 5.0,
        "kl_nats_per_token": 0.01,
        "kl_stderr": 0.001,
        "predicted_kl_nats_per_token": 0.011,
    }
    (folder / "validation.json").write_text(json.dumps(validation))
    return folder


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Drawing:
    return read_drawing(
        read_table(folder / "table.jsonl"),
        recipes=[folder / "mine.yaml"],
        validations=[folder / "validation.json"],
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", FIGURES)
def test_each_kind_is_drawn_and_drawn_again_gives_the_same_bytes(
    inputs: Drawing, tmp_path: Path, kind: str
) -> None:
    for name in ("first.svg", "second.svg"):
        draw_figure(kind, inputs, path=tmp_path / name)
    first = (tmp_path / "first.svg").read_bytes()
    assert first == (tmp_path / "second.svg").read_bytes()
    root = ElementTree.fromstring(first)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.svg", "second.svg"]


def test_names_stay_inside_cover_nothing_and_share_a_place(
    inputs: Drawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    figures: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *some: object, **named: object) -> None:
        figures.append(figure)
        save(figure, *some, **named)

    monkeypatch.setattr(Figure, "savefig", kept)
    twin = replace(inputs.recipes[0], label="twin.yaml")
    far = replace(inputs.recipes[0], label="at the right end of the axis", at=8.95)
    drawing = replace(inputs, recipes=(*inputs.recipes, twin, far))
    draw_figure("frontier", drawing, path=tmp_path / "frontier.png")
    [axes] = figures[0].axes
    names = [one for one in axes.texts if isinstance(one, Annotation)]
    assert {"mine.yaml, twin.yaml", far.label} < {one.get_text() for one in names}
    assert not any(one.get_text() == "mine" for one in names)  # measured, and named already
    boxes = [one.get_window_extent() for one in names]
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # itself


def test_the_command_draws_a_png(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.png"
    table, recipe = str(folder / "table.jsonl"), str(folder / "mine.yaml")
    result = CliRunner().invoke(app, ["plot", table, recipe, "--kind", "map", "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_it_drew_to_a_machine(folder: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "map.svg", str(folder / "table.jsonl")
    arguments = ["plot", table, str(folder / "mine.yaml"), "--kind", "map", "-o", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said.pop("seconds") >= 0
    assert said == {"figure": str(output), "kind": "map", "bytes": output.stat().st_size}


def test_a_table_without_profiles_says_how_to_get_them(inputs: Drawing, tmp_path: Path) -> None:
    old = replace(inputs, table=replace(inputs.table, profiles=()))
    with pytest.raises(MofqError, match=r"says nothing of the size of weights.*into a new table"):
        draw_figure("weights", old, path=tmp_path / "f.png")


def test_a_validation_that_a_figure_of_predictions_leaves_out_is_told(
    folder: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "validation.json").read_text())
    files = {
        "mine": {},
        "edited": {"predicted_kl_nats_per_token": None},
        "tuned": {"is_tuned": True},  # what is predicted is of before
        "bf16": {"predicted_kl_nats_per_token": 0.0},
    }
    arguments = ["plot", str(folder / "table.jsonl"), "--kind", "prediction"]
    for name, changes in files.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**content, "candidate": f"{name}.yaml", **changes}))
        arguments += ["--validation", str(path)]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "f.svg")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "2 of 4 validations not drawn (edited, tuned): no prediction is known" in said
    assert "1 of 4 validations not drawn (bf16): a KL of 0, predicted or measured" in said


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("frontier", "f.gif", r"f\.gif: must end in one of \.png, \.svg, \.pdf"),
        ("map", "f.png", "a map shows recipes"),
        ("prediction", "f.png", "needs validations of recipes that have one"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_is_left(
    folder: Path, tmp_path: Path, kind: str, name: str, message: str
) -> None:
    alone = read_drawing(read_table(folder / "table.jsonl"))
    with pytest.raises(MofqError, match=message):
        draw_figure(kind, alone, path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []
