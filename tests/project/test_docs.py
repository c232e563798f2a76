"""The documentation: commands run, the reference is the code's, specifications are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from command_line import mofq
from test_readme import MOFQ, ROOT, Command, blocks

from mofq.decision.recipe import RECIPE_SCHEMA, parse_recipe
from mofq.evidence.corpora import BUNDLED_TEXT
from mofq.evidence.spaces import SEARCH_SPACE_SCHEMA, parse_search_space
from mofq.evidence.table import TABLE_LINE_SCHEMA
from mofq.numbers.formats import FloatFormat
from mofq.numbers.schemes import ScaleRule

DOCS = ROOT / "docs"
TUTORIAL = "docs/tutorial.md"
#: Of a real model, whose folder and texts they say how to get; the second goes on where the first
#: ends.
REAL_TUTORIALS = [f"docs/tutorials/{name}.md" for name in ("serve", "accuracy", "languages")]
#: Of these, commands that need another table or model are only read.
OTHERS = ("docs/decide.md", "docs/deploy.md")
#: Run one after another, each finding what the ones before have made.
IN_ORDER = ("docs/how-to/recipe.md", "docs/how-to/explore.md", *OTHERS, "README.md")
#: What stands for what a reader has; a command with another word in capitals is only read.
STAND_FOR = {"MODEL": "mofq/demo/model", "FOLDER": "folder", "TABLE": "table.jsonl"}
#: A test of `mofq run` runs the first; the text beside the other says that it needs a recipe of
#: other schemes.
ONLY_READ = {
    "mofq demo",
    "mofq export MODEL recipe.yaml --to modelopt -o hf_quant_config.json",
}
#: Options that a command gets where the page leaves them at their defaults: that it runs is seen on
#: little text and with little effort too. The first tutorial runs at full size.
SMALL = {
    "calibrate": ("--sequences 8", "--sequence-length 64"),
    "run": ("--sequences 8", "--sequence-length 64", "--tokens 512", "--effort quick"),
    "search": ("--tokens 512", "--sequence-length 64"),
    "validate": ("--tokens 512", "--sequence-length 64"),
}
_PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b")
_FILES = {".txt", ".jsonl", ".json", ".yaml", ".html"}


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with three texts of a reader's own."""
    for name in ("mofq", "search_spaces"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file, text in (
        ("calibration.txt", "demo-en-calibration"),
        ("heldout.txt", "demo-en"),
        ("other.txt", "demo-pt"),
    ):
        (tmp_path / file).write_text(BUNDLED_TEXT[text].read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_of(document: str) -> list[Command]:
    return [one for one in MOFQ if one.where.startswith(f"{document}:")]


def runnable(command: Command, sandbox: Path) -> tuple[str, ...] | None:
    """The command for the bundled model; None: something that it reads is not there."""
    words = [STAND_FOR.get(word, word) for word in command.words]
    if (
        command.is_heavy
        or " ".join(command.words) in ONLY_READ
        or any(_PLACEHOLDER.search(word) for word in words)
    ):
        return None
    read = [w.partition("=")[2] or w for b, w in pairwise(words) if b != "-o"]
    files = [word for word in read if "/" in word or Path(word).suffix in _FILES]
    return tuple(words) if all((sandbox / word).exists() for word in files) else None


def run(command: Command, words: tuple[str, ...]) -> None:
    done = mofq(*words[1:])
    assert done.code == 0, f"{command.where}: {' '.join(command.words)}: {done.err}"


def small(words: tuple[str, ...]) -> tuple[str, ...]:
    """The command on little text; what reads no text is left as it stands."""
    if words[1] == "search" and "--text" not in words:
        return words
    options = [one.split() for one in SMALL.get(words[1], ())]
    return *words, *(word for one in options if one[0] not in words for word in one)


@pytest.mark.long(first=True)
def test_every_command_of_the_tutorial_runs_as_it_stands(sandbox: Path) -> None:
    for command in commands_of(TUTORIAL):
        words = runnable(command, sandbox)
        assert words == command.words, f"{command.where}: {' '.join(command.words)} cannot run"
        run(command, words)
    validation = json.loads((sandbox / "validation.json").read_text("utf-8"))
    assert validation["enforced"] is True
    mixed, uniform = (
        json.loads((sandbox / name).read_text("utf-8"))["kl_nats_per_token"]
        for name in ("validation.json", "int4.json")
    )
    assert mixed < uniform / 2


@pytest.mark.long(first=True)
def test_the_commands_of_the_other_tutorials_run_on_the_bundled_model(sandbox: Path) -> None:
    (sandbox / "SmolLM2-135M").symlink_to(sandbox / "mofq/demo/model")
    for document in REAL_TUTORIALS:
        for file, text in saved_files(document):
            (sandbox / file).write_text(text, encoding="utf-8")
        assert len(commands_of(document)) >= 4
        for command in commands_of(document):
            # Rules for the first and last decoder layers take more of the bundled model's six.
            words = [
                "7.5" if before == "--max-bits" else word
                for before, word in pairwise(["", *command.words])
            ]
            run(command, small(tuple(words)))


def saved_files(document: str) -> Iterator[tuple[str, str]]:
    """Name and content of the files that a page tells to save."""
    text = (ROOT / document).read_text("utf-8")
    yield from re.findall(r"[Ss]ave this as `([\w.]+)`:\n\n```\w+\n(.*?)^```", text, re.M | re.S)


@pytest.mark.long(first=True)
def test_the_commands_of_the_readme_and_how_tos_run_on_the_bundled_model(sandbox: Path) -> None:
    ran: dict[str, int] = {}
    for document in IN_ORDER:
        for command in commands_of(document):
            words = runnable(command, sandbox)
            if words is not None:
                run(command, small(words))
                ran[document] = ran.get(document, 0) + 1
    assert ran["README.md"] == 1
    here = {name: [one for one in commands_of(name) if not one.is_heavy] for name in ran}
    left = {document: len(here[document]) - count for document, count in ran.items()}
    assert all(left[document] <= 3 for document in IN_ORDER[:-1]), left


@pytest.mark.slow
def test_the_commands_of_the_mathematics_run(sandbox: Path) -> None:
    for command in commands_of("docs/sensitivity.md"):
        words = runnable(command, sandbox)
        assert command.is_heavy or words is not None, command
        if words is not None:
            run(command, words)


def test_the_reference_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    script = import_module("scripts.make.reference")
    texts: dict[str, str] = script.reference_texts()
    folder = DOCS / "reference"
    # What minutes of scripts.make.families and scripts.serve.structures found.
    found = {"families.md", "served.md"}
    assert {path.name for path in folder.iterdir()} == texts.keys() | found
    # To bring them up to date: python scripts/make/reference.py
    assert [name for name in texts if (folder / name).read_text("utf-8") != texts[name]] == []
    assert set(script.RULES) == set(get_args(ScaleRule))


def keys_of(schema: Any) -> Iterator[str]:
    """Every key that a document may have, at any depth."""
    if isinstance(schema, Mapping):
        yield from schema.get("properties", {})
        for one in schema.values():
            yield from keys_of(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from keys_of(one)


@pytest.mark.parametrize(
    ("page", "schema"),
    [
        ("recipe", RECIPE_SCHEMA),
        ("table", TABLE_LINE_SCHEMA),
        ("search-space", SEARCH_SPACE_SCHEMA),
    ],
)
def test_a_specification_names_every_key_of_its_schema(page: str, schema: dict[str, Any]) -> None:
    text = (DOCS / "specifications" / f"{page}.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert set(keys_of(schema)) - named - {"kind"} == set()


def example(page: str) -> str:
    return next(blocks(DOCS / "specifications" / f"{page}.md", "yaml"))[1]


def test_the_examples_of_the_specifications_are_valid() -> None:
    recipe = parse_recipe(example("recipe"), where="recipe.md")
    assert recipe.schemes["model.layers.0.self_attn.k_proj"] == "int8.channel+int8.token"
    space = parse_search_space(example("search-space"), name="mine", where="search-space.md")
    assert len(space.candidates) == 4  # bf16 is one more choice


def test_the_example_of_a_format_is_the_format_of_that_name() -> None:
    import ml_dtypes

    code = next(blocks(DOCS / "architecture.md", "python"))[1]
    names: dict[str, Any] = {}
    exec(compile(code, "architecture.md", "exec"), names)
    made = names["FP8_E3M4"]
    assert isinstance(made, FloatFormat)
    assert made.max == float(ml_dtypes.finfo(ml_dtypes.float8_e3m4).max)
    assert made.bits == 8


def test_every_page_is_in_the_navigation_and_reached_from_the_first() -> None:
    configuration = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    pages = {page for one in configuration["nav"] for page in leaves(one)}
    assert pages == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    index = (DOCS / "index.md").read_text("utf-8")
    assert {page for page in pages if f"]({page})" not in index} == {"index.md"}


def leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, Mapping):
        for one in entry.values():
            yield from leaves(one)
    else:
        for one in entry:
            yield from leaves(one)


def test_the_readme_counts_the_types_that_pass_as_their_page_does() -> None:
    page = (DOCS / "reference" / "families.md").read_text("utf-8")
    causal, images = re.findall(r"(?:Causal|Images and text): (\d+) of the (\d+) types pass", page)
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert (
        f"{causal[0]} of transformers' {causal[1]} causal ones and {images[0]} of {images[1]} that"
        " read images" in readme
    )
