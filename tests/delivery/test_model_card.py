"""What the README of an export says: how it is used, its licence, what it was made from."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import mofq, ok
from exported import uniform_recipe

from mofq.delivery.export.compressed_tensors import Export, export_compressed_tensors
from mofq.model.checkpoint.headers import open_checkpoint


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def export(model: Path, name: str = "out", engine: str | None = None) -> Export:
    checkpoint = open_checkpoint(str(model))
    recipe = uniform_recipe(checkpoint, "int4.g32")
    return export_compressed_tensors(checkpoint, recipe, model.parent / name, engine=engine)


def metadata(folder: Path) -> dict[str, Any]:
    _, block, _ = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    found = yaml.safe_load(block)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("engine", [None, "vllm-cpu", "vllm-hopper:tp=2", "sglang-hopper"])
def test_the_serve_line_is_one_for_a_shell_whatever_the_folder_is_called(
    engine: str | None, model: Path
) -> None:
    done = export(model, "it's a $HOME; model", engine)
    assert done.serve_command is not None
    assert shlex.split(done.serve_command).count(str(done.folder)) == 1
    assert f"```bash\n{done.serve_command}\n```" in (done.folder / "README.md").read_text("utf-8")


def test_an_engine_that_is_no_server_is_given_code_that_loads_the_folder(model: Path) -> None:
    done = export(model, "a 'model'", "transformers")
    card = (done.folder / "README.md").read_text("utf-8")
    assert "vllm" not in card
    assert "## Serving" not in card
    assert done.serve_command is None
    code = card.partition("```python\n")[2].partition("```")[0]
    assert f"model = {done.load_code}\n" in code
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.isfinite(names["model"](torch.tensor([[1, 2, 3]])).logits).all()


def test_the_commands_say_so_too(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", model, "int4.g32", "-o", recipe)
    folder = tmp_path / "for transformers"
    command = ("export", model, recipe, "--engine", "transformers", "-o", folder)
    out = ok(*command).out
    line = f"Load it with: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    assert out == line
    shutil.rmtree(folder)
    content = mofq(*command, "--json").json
    assert content["serve_command"] is None
    assert content["load_code"] == line.removeprefix("Load it with: ").strip()


@pytest.mark.parametrize(
    ("card", "needed"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A\n", {"license": "apache-2.0"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: 'llama: 3'\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "llama: 3", "license_link": "LICENSE"},
        ),
        ("---\nlicense:\n- mit\n- gpl-3.0\n---\n", {"license": ["mit", "gpl-3.0"]}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\nlicense: [\n---\n", {"license": "from the config"}),
        ("# No metadata\n---\nlicense: mit\n---\n", {"license": "from the config"}),
        (None, {"license": "from the config"}),
    ],
)
def test_the_card_keeps_the_licence_of_the_source(
    card: str | None, needed: dict[str, object], model: Path
) -> None:
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"license": "from the config"}))
    if card is not None:
        (model / "README.md").write_text(card, "utf-8", newline="")
    written = metadata(export(model).folder)
    assert {key: value for key, value in written.items() if key.startswith("license")} == needed
    # A model made from it has the licence too, though the first card is another one by then.
    (model / "README.md").rename(model / "README.original.md") if card is not None else None
    again = metadata(export(model, "again").folder)
    assert {key: value for key, value in again.items() if key.startswith("license")} == needed


def test_the_card_names_the_model_that_it_was_made_from(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    recipe = uniform_recipe(checkpoint, "int4.g32")
    # A folder's own name is none that the hub would find.
    out = model.parent / "local"
    export_compressed_tensors(checkpoint, recipe, out)
    assert "base_model" not in metadata(out)
    # From the hub, or by a recipe that was made for the hub's.
    hub = replace(checkpoint, name="org/Base-1.5")
    for number, (source, made_for) in enumerate(
        ((hub, recipe), (checkpoint, replace(recipe, model_name="org/Base-1.5")))
    ):
        out = model.parent / str(number)
        export_compressed_tensors(source, made_for, out)
        assert metadata(out)["base_model"] == "org/Base-1.5"
        assert metadata(out)["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("lineage", "base"),
    [
        ('{"model": {"name": "org/Base"}}', "org/Base"),
        ('{"model": {"name": "folder"}}', None),
        ('{"model": {"name": "a/b\\nlicense: mit"}}', None),
        ('{"model": ["org/Base"]}', None),
        ("not JSON", None),
    ],
)
def test_the_card_of_a_rewritten_model_names_what_that_was_made_from(
    lineage: str, base: str | None, model: Path
) -> None:
    (model / "rewrite.json").write_text(lineage)
    out = export(model).folder
    assert metadata(out).get("base_model") == base
    assert "license" not in metadata(out)
    assert ("which `mofq rewrite` made from: " in (out / "README.md").read_text("utf-8")) == (
        base is not None or "folder" in lineage
    )
