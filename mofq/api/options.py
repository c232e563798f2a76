"""The options of the stages: each one's name, type, default and help text, written once.

The command line and the reference pages are derived from them (`mofq.cli.parsing`). An option
that several stages share is a type here; options that belong together are a group: a frozen
dataclass, which Python passes whole and the command line as one flag for each field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.evidence.table import Table

#: Called with remarks of one line, which a user should read.
Tell = Callable[[str], None]


def silent(message: str) -> None:
    """Tell nobody: where the caller of a stage wants no remarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How a parameter is given on the command line."""

    help: str
    positional: bool = False
    flag: str | None = None  #: None: the parameter's name, ``max_bits`` as ``--max-bits``
    short: str | None = None
    least: int | None = None  #: smallest value of a number
    required: bool = False  #: although Python has a default
    written_as: Any = None  #: type of the text, where Python takes other types too


Model = Annotated[
    str | Path,
    Option(help="A Hugging Face model folder, or a hub id.", positional=True, written_as=str),
]
TableFile = Annotated[
    str | Path, Option(help="From `mofq measure`.", positional=True, written_as=Path)
]
AnyTable = Annotated[
    "Table | str | Path", Option(help="From `mofq measure`.", positional=True, written_as=Path)
]
RecipeOutput = Annotated[
    str | Path | None,
    Option(help="The recipe, recipe.yaml.", short="-o", required=True, written_as=Path),
]
Engine = Annotated[
    str | None, Option(help="A serving engine, of `mofq engines`; NAME:tp=4 on 4 devices.")
]
Space = Annotated[
    str | Path,
    Option(help="A search space: a name of `mofq spaces`, or a file.", written_as=str),
]
Device = Annotated[str, Option(help="Where the arithmetic runs: cpu, cuda, cuda:1 …")]
DeviceModel = Annotated[
    str | None,
    Option(help="Whose figures give times: h100 … of `mofq devices`, or a YAML file."),
]
Stats = Annotated[
    str | Path | None,
    Option(
        help="From `mofq calibrate`; needed where schemes are fitted (@nats, ~gptq).",
        written_as=Path,
    ),
]
Sequences = Annotated[
    int | None, Option(help="Of each corpus; 32 by default, or what a text holds.", least=1)
]
WindowLength = Annotated[int, Option(help="Tokens of a window.", least=2)]
Recipes = Annotated[
    Sequence[str | Path],
    Option(help="Recipes to show or compare.", positional=True, written_as=list[Path]),
]
Validations = Annotated[
    Sequence[str | Path],
    Option(help="From `mofq validate -o`; repeatable.", flag="--validation", written_as=list[Path]),
]
#: ``NAME=SOURCE`` each, or sources that name themselves, or names with their sources.
Corpora = Mapping[str, str] | Sequence[str]
AnyRecipe = Annotated[
    "Recipe | str | Path",
    Option(help="From `mofq search`.", positional=True, written_as=Path),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a recipe may cost. Without ``max_bits`` and ``max_size``, ``max_kl`` minimises size."""

    max_bits: Annotated[float | None, Option(help="True bits per weight, at most.")] = None
    max_size: Annotated[
        str | int | None,
        Option(help="Bytes of the whole checkpoint, e.g. 5GB or 4.5GiB.", written_as=str),
    ] = None
    max_kl: Annotated[
        float | None,
        Option(help="Predicted nats per token, at most; alone: the smallest model within it."),
    ] = None
    max_finer: Annotated[
        float | None, Option(help="Share of linear layers that leave the base schemes.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a recipe may be made of: the rows of a table that count, and the KV cache."""

    engine: Engine = None
    space: Annotated[
        str | None, Option(help="Only this search space of the table; all by default.")
    ] = None
    unit: Annotated[str | None, Option(help="Of the rows to use; nats where there are.")] = None
    max_kv_bits: Annotated[
        float | None, Option(help="Bits per cached number: the KV cache is decided too.")
    ] = None
    kv_tokens: Annotated[
        int, Option(help="Of context, whose KV cache counts as size: decided too.", least=0)
    ] = 0
    kv_formats: Annotated[
        Sequence[str],
        Option(
            help="Formats it may have, beside bf16; repeatable.",
            flag="--kv-cache",
            written_as=list[str],
        ),
    ] = ()

    @property
    def decides_cache(self) -> bool:
        """Whether the format of the KV cache is decided with the layers."""
        return self.max_kv_bits is not None or self.kv_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of a forward pass: told where a device and a workload are named, and limited."""

    max_time: Annotated[
        str | None, Option(help="Least time of the workload on the device, e.g. 12ms.")
    ] = None
    device_model: DeviceModel = None
    workload: Annotated[
        str | None,
        Option(help="decode:batch=8,context=1024 or prefill:prompt=2048, with tp=N."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a recipe is looked for."""

    solver: Annotated[
        Literal["exact", "greedy", "optuna"], Option(help="exact, greedy or optuna.")
    ] = "exact"
    objective: Annotated[
        Literal["mean", "worst-corpus"], Option(help="Over corpora: mean or worst-corpus.")
    ] = "mean"
    ties: Annotated[
        Literal["on", "off"],
        Option(help="on: choices within noise go to the simpler scheme."),
    ] = "on"
    refine: Annotated[int, Option(help="Measure this many swaps on the real model.", least=0)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OnModel:
    """What measures a recipe on the model itself."""

    model: Annotated[str | Path | None, Option(help="For --refine and optuna.", written_as=str)] = (
        None
    )
    text: Annotated[str | None, Option(help="For --refine and optuna.")] = None
    tokens: Annotated[int, Option(help="Of the text, for --refine and optuna.", least=2)] = 4096
    sequence_length: WindowLength = 512
    device: Device = "cpu"
    stats: Stats = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The trials of ``solver="optuna"``."""

    trials: Annotated[int, Option(help="Of optuna; earlier ones count.", least=1)] = 60
    multi_objective: Annotated[bool, Option(help="Of optuna: true bits as a second objective.")] = (
        False
    )
    storage: Annotated[
        str | None,
        Option(help="Of optuna: a URL, an SQLite or journal file; beside -o by default."),
    ] = None
    workers: Annotated[int, Option(help="Processes of optuna.", least=1)] = 1
    seed: Annotated[int, Option(help="Of optuna's proposals.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where the work is done: this machine, or a Ray cluster."""

    device: Device = "cpu"
    cluster: Annotated[
        str | None,
        Option(help="Work on a Ray cluster: 'ray' (on this machine), or ray://HOST:PORT."),
    ] = None
    cluster_cpus: Annotated[int, Option(help="CPUs of each worker of --cluster.", least=1)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What is drawn from the calibration text, and kept of it."""

    sequences: Sequences = None
    keep: Annotated[int, Option(help="Of how many the samples are kept.", least=1)] = 8
    sequence_length: Annotated[int, Option(help="Tokens of a sequence.", least=2)] = 512
    draws: Annotated[int, Option(help="Random draws for each sequence.", least=1)] = 1
    seed: Annotated[int, Option(help="Of the random draws.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The part of a text that models are compared on."""

    tokens: Annotated[
        int,
        Option(help="How many tokens of the text, at most, in windows spread over it.", least=2),
    ] = 8192
    sequence_length: WindowLength = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEval:
    """Tasks by which lm-eval scores both models, beside the text."""

    tasks: Annotated[
        Sequence[str],
        Option(help="lm-eval tasks, by commas or repeated.", written_as=list[str]),
    ] = ()
    task_folder: Annotated[
        str | Path | None,
        Option(help="With task files of lm-eval's format.", written_as=Path),
    ] = None
    task_limit: Annotated[int | None, Option(help="Items of each task.", least=1)] = None
