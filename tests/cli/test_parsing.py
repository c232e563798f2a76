"""Commands are made of functions: every option is a flag, and arrives where it belongs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from mofq.api.options import OTHERS, Option, Tell, documented
from mofq.cli.commands import command
from mofq.cli.parsing import SectionedCommand, as_command, sections

#: Command -> arguments and flags that users' scripts may have, beside --json.
FLAGS = {
    "inspect": "model --engine --space --layers --lm-head --embeddings",
    "calibrate": "model --corpus -o --output --sequences --keep --sequence-length --bos --inputs "
    "--seed --dtype --device --execution --kv-cache --layers "
    "--lm-head --embeddings --cluster --cluster-cpus",
    "rewrite": "model --stats --method -o --output --scheme --powers-of-two --seed",
    "measure": "model --space -o --output --stats --corpus --sequences --keep --sequence-length "
    "--bos --inputs --seed --dtype --engine --experts --layers --lm-head --embeddings "
    "--device --cluster --cluster-cpus",
    "search": "table -o --output --solver --engine --max-bits --max-size --max-kl --max-finer "
    "--max-active-bits --max-time --max-kv-bits --kv-tokens --kv-cache --device-model "
    "--workload --explain --space --fix --at-least --at-most --unit --objective --ties --model "
    "--text --refine --tokens "
    "--sequence-length --device --stats --trials --multi-objective --trial --storage "
    "--workers --seed --corpus-weights --execution",
    "tune": "model recipe --corpus -o --output --stats --what --steps --sequences "
    "--sequence-length --bos --dtype --device --execution",
    "validate": "model recipe_or_folder --text --tokens --sequence-length --bos --dtype --device "
    "--execution --stats --backend --emulate --tasks --task-folder --task-limit -o --output",
    "export": "model recipe -o --output --to --engine --stats --validation",
    "run": "model -o --output --space --effort --max-bits --max-size --max-kl --max-finer "
    "--max-active-bits --corpus --text --engine --tokens --sequence-length --bos --sequences "
    "--dtype --device --corpus-weights --objective --rivals --no-stats "
    "--fix --at-least --at-most --execution --layers --lm-head --embeddings",
    "demo": "-o --output --mixture",
    "frontier": "table --unit --engine --space --fix --at-least --at-most --max-kv-bits "
    "--kv-tokens --kv-cache --polish --corpus-weights",
    "diff": "first second --table --corpus-weights",
    "spaces": "",
    "formats": "",
    "engines": "",
    "devices": "",
    "advise": "model --device-model --deployment --recovery --tp",
    "explore": "table recipes --validation --unit --engine --space --fix --at-least --at-most "
    "--max-kv-bits --kv-tokens --kv-cache -o --output --corpus-weights",
    "plot": "table recipes --kind -o --output --validation --unit --engine --space --fix "
    "--at-least --at-most --max-kv-bits --kv-tokens --kv-cache --corpus-weights",
    "recipe uniform": "model scheme -o --output --stats --layers --lm-head --embeddings",
    "recipe from": "folder -o --output --model",
}


def made_commands() -> dict[str, Any]:
    group: Any = command
    found = dict(group.commands)
    inner = found.pop("recipe").commands
    return found | {f"recipe {name}": one for name, one in inner.items()}


def test_the_flags_are_those_that_scripts_of_users_have() -> None:
    commands = made_commands()
    assert commands.keys() == FLAGS.keys()
    for name, flags in FLAGS.items():
        found = {
            word
            for one in commands[name].params
            for word in (*one.opts, *getattr(one, "secondary_opts", ()))
        }
        assert found == {*flags.split(), "--json"}, name


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large it is."""

    width: Annotated[int, Option("In columns.", least=1, is_first=True)] = 80
    height: Annotated[float | None, Option("In lines.")] = None


@dataclass(frozen=True, slots=True)
class Drawn:
    given: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) for name, value in self.given.items()}


@documented
def draw(
    picture: Annotated[Drawn | str | Path, Option("What is drawn.", positional=True)],
    output: Annotated[str | Path | None, Option("The file.", short="-o", required=True)] = None,
    *,
    size: Size = Size(width=100),
    colours: Annotated[Sequence[str], Option("Repeatable.", flag="--colour")] = (),
    style: Annotated[Literal["plain", "bold"], Option("plain or bold.", is_first=False)] = "plain",
    upside_down: Annotated[bool, Option("As it says.", is_first=False)] = False,
    secret: int = 7,
    tell: Tell | None = None,
) -> Drawn:
    """Draw a picture.

    Returns:
        What was given.
    """
    assert tell is not None
    tell("drawing")
    return Drawn(dict(locals()))


def ran(*arguments: str) -> Any:
    shown: list[Drawn] = []
    own = typer.Typer()
    own.command()(as_command(draw, shown.append))
    result = CliRunner().invoke(own, list(arguments))
    return shown[0].given if result.exit_code == 0 and shown else result


def test_what_is_typed_arrives_at_the_function_in_its_types() -> None:
    given = ran("cat.png", "-o", "out", "--height", "2", "--colour", "red", "--colour", "blue")
    assert given["picture"] == Path("cat.png")
    assert given["output"] == Path("out")
    assert given["size"] == Size(width=100, height=2.0)
    assert given["colours"] == ("red", "blue")
    assert (given["style"], given["upside_down"], given["secret"]) == ("plain", False, 7)


def test_a_flag_and_a_word_arrive_and_an_unknown_word_is_refused() -> None:
    given = ran("cat.png", "-o", "out", "--upside-down", "--style", "bold")
    assert (given["style"], given["upside_down"]) == ("bold", True)
    refused = ran("cat.png", "-o", "out", "--style", "bald").exception
    assert str(refused) == "--style bald: unknown. Did you mean 'bold'?"


@pytest.mark.parametrize(
    "arguments",
    [("cat.png",), ("-o", "out"), ("cat.png", "-o", "out", "--width", "0")],
    ids=["required by the command line", "required", "too small"],
)
def test_what_is_missing_or_too_small_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert ran(*arguments).exit_code == 2


def test_the_help_has_what_matters_first_and_groups_under_their_titles() -> None:
    own = typer.Typer(rich_markup_mode=None, add_completion=False)
    own.command(cls=SectionedCommand)(as_command(draw, print))
    text = CliRunner().invoke(own, ["--help"]).stdout
    blocks = dict(re.findall(r"^(\w[^\n]*):\n((?:  .*\n)+)", text, flags=re.MULTILINE))
    flags = {title: re.findall(r"--[\w-]+", block) for title, block in blocks.items()}
    assert list(flags.items())[1:] == [
        ("Options", ["--output", "--width", "--colour", "--json", "--help"]),
        ("How large it is", ["--height"]),
        (OTHERS, ["--style", "--upside-down"]),
    ]
    for shown in ("-o, --output <path> ", "--width <number> ", "--colour <text> "):
        assert shown in blocks["Options"]
    assert "--style plain|bold " in blocks[OTHERS]


def test_the_help_of_a_search_begins_with_eight_options() -> None:
    search = made_commands()["search"]
    context = search.make_context("search", ["--help"], resilient_parsing=True)
    first = [names.split()[0].strip(",") for names, _ in sections(search, context)["Options"]]
    assert first == [
        *("-o", "--max-bits", "--max-size", "--max-kl", "--fix", "--engine", "--explain"),
        *("--json", "--help"),
    ]


def test_the_help_texts_of_the_options_stand_in_the_docstring_too() -> None:
    assert inspect.getdoc(draw) == (
        "Draw a picture.\n\n"
        "Args:\n"
        "    picture: What is drawn.\n"
        "    output: The file.\n"
        "    size: How large it is.\n"
        "    colours: Repeatable.\n"
        "    style: plain or bold.\n"
        "    upside_down: As it says.\n"
        "    tell: Called with each remark of one line that a user should read.\n\n"
        "Returns:\n"
        "    What was given."
    )
