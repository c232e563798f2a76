"""The options of the stages: each one's name, type, default and help text, written once.

The command line and the reference pages are derived from them (`mofq.cli.parsing`). An option
that several stages share is a type here; options that belong together are a group: a frozen
dataclass, which Python passes whole and the command line as one flag for each field. What Python
gives is held to the same types and smallest values as what the command line reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, is_dataclass
from functools import wraps
from numbers import Integral, Real
from operator import attrgetter
from pathlib import Path
from reprlib import repr as short
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ForwardRef,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from mofq.evidence.corpora import Bos
from mofq.exceptions import MofqError, nearest_name
from mofq.exceptions import option as spelled
from mofq.files.progress import Tell as Tell
from mofq.files.progress import silent as silent

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.evidence.spaces import SearchSpace
    from mofq.evidence.table import Table
    from mofq.model.layers import Included

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """How a parameter is given on the command line."""

    help: str
    _: KW_ONLY
    positional: bool = False
    flag: str | None = None  #: None: the parameter's name, ``max_bits`` as ``--max-bits``
    short: str | None = None
    least: int | None = None  #: smallest value of a number
    required: bool = False  #: although Python has a default
    read_as: Any = None  #: type of the text; None: that of the parameter
    #: Whether ``--help`` shows it before the titled sections. None: unless it is of a group.
    is_first: bool | None = None


#: Where ``--help`` shows the options that are of no group and not of the first.
OTHERS = "Less often needed"
#: What a stage takes beside its options.
_REPORTS = {
    "progress": "Called with the name of a long stage, the steps done and all steps.",
    "tell": "Called with each remark of one line that a user should read.",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """An option of a function: a parameter of its own, or a field of a group."""

    name: str
    group: str | None  #: the parameter that is the group; None: it is no field
    section: str | None  #: the title that it stands under in ``--help``; None: it is of the first
    annotation: Any  #: what Python gives
    option: Option
    default: Any  #: `inspect.Parameter.empty` where there is none


def parameters_of(function: Callable[..., Any]) -> Iterator[Parameter]:
    """The options of a function, those of a group one by one; what has no `Option` is none."""
    annotations = inspect.get_annotations(function, eval_str=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = annotations[name]
        if isinstance(annotation, type) and is_dataclass(annotation):
            types, titles = _types_of(annotation), _titles_of(annotation)
            for field in map(attrgetter("name"), fields(annotation)):
                default = getattr(parameter.default, field)
                yield _parameter(field, types[field], default, group=name, title=titles[field])
        elif hasattr(annotation, "__metadata__"):
            yield _parameter(name, annotation, parameter.default)


def title_of(group: type) -> str:
    """What a group is, in its first line."""
    return (group.__doc__ or "").partition("\n")[0].rstrip(".")


def _types_of(group: type) -> dict[str, Any]:
    """The annotations of a group's fields, and of those that it has from another group."""
    types: dict[str, Any] = {}
    for kind in reversed(group.__mro__):
        types |= inspect.get_annotations(kind, eval_str=True)
    return types


def _titles_of(group: type) -> dict[str, str]:
    """Field -> what the class is, in its first line, that has it first."""
    return {
        field: title_of(kind) for kind in group.__mro__ for field in inspect.get_annotations(kind)
    }


def _parameter(
    name: str,
    annotation: Any,
    default: Any,
    *,
    group: str | None = None,
    title: str = OTHERS,
) -> Parameter:
    python, option = get_args(annotation)
    is_first = group is None if option.is_first is None else option.is_first
    return Parameter(name, group, None if is_first else title, python, option, default)


def documented(function: Function) -> Function:
    """Explain the options of a function in its docstring, and check them before it runs.

    The help texts stand before what is returned. A value that is not of its option's type, none of
    its words, or below its smallest, is refused with a `MofqError`.
    """
    annotations = inspect.get_annotations(function, eval_str=True)
    signature = inspect.signature(function)
    groups = {one.name: one.group for one in parameters_of(function) if one.group is not None}

    @wraps(function)
    def checked(*positional: Any, **named: Any) -> Any:
        for name in named.keys() & groups.keys() - annotations.keys():
            group = annotations[groups[name]].__name__
            raise TypeError(
                f"{function.__name__}() takes {name} in a group: {groups[name]}={group}({name}=…)"
            )
        try:
            given = signature.bind(*positional, **named).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        for name, value in given.items():
            _check_argument(name, value, annotations[name])
        return function(*positional, **named)

    checked.__doc__ = _with_options(function, annotations)
    return checked  # type: ignore[return-value]


def _with_options(function: Callable[..., Any], annotations: Mapping[str, Any]) -> str:
    """The docstring with the help texts of the options."""
    texts: dict[str, str] = {}
    for one in parameters_of(function):
        if one.group is None:
            texts[one.name] = one.option.help
        else:
            texts[one.group] = f"{title_of(annotations[one.group])}."
    texts |= {name: text for name, text in _REPORTS.items() if name in annotations}
    lines = "".join(f"    {name}: {texts[name]}\n" for name in annotations if name in texts)
    text = inspect.getdoc(function) or ""
    return text.replace("Returns:\n", f"Args:\n{lines}\nReturns:\n", 1)


def _check_argument(name: str, value: object, annotation: Any) -> None:
    if isinstance(annotation, type) and is_dataclass(annotation):
        # What a larger group has more, the stage would not read.
        if type(value) is not annotation:
            raise MofqError(f"{name}: needed {annotation.__name__}(…), found {short(value)}.")
        for field, of_field in _types_of(annotation).items():
            _check_argument(field, getattr(value, field), of_field)
    elif hasattr(annotation, "__metadata__"):
        _check_value(name, value, *get_args(annotation))


def _check_value(name: str, value: object, annotation: Any, option: Option) -> None:
    if get_origin(annotation) is Literal and isinstance(value, str):
        if value not in (words := get_args(annotation)):
            raise MofqError(f"{spelled(name, value)}: unknown." + nearest_name(value, words))
        return
    if not _fits(value, annotation):
        needed = (
            annotation.__forward_arg__
            if isinstance(annotation, ForwardRef)
            else inspect.formatannotation(annotation)
        )
        for module in ("collections.abc.", "pathlib."):
            needed = needed.replace(module, "")
        hint = " Put it into a list." if isinstance(value, str) and "Sequence" in needed else ""
        raise MofqError(f"{name}: needed {needed}, found {short(value)}.{hint}")
    if option.least is not None and isinstance(value, Real) and value < option.least:
        raise MofqError(f"{name}: needed at least {option.least}, found {value}.")


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value is of a type."""
    arguments = get_args(annotation)
    if isinstance(annotation, str):  # of the items of a sequence
        annotation = ForwardRef(annotation)
    if isinstance(annotation, ForwardRef):  # names what is not imported yet
        names = annotation.__forward_arg__.replace("None", "NoneType").split(" | ")
        return any(kind.__name__ in names for kind in type(value).__mro__)
    match get_origin(annotation):
        case origin if origin in (Union, UnionType):
            return any(_fits(value, one) for one in arguments)
        case origin if origin is Literal:
            return False
        case origin if origin is Sequence:
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            return is_list and all(_fits(one, arguments[0]) for one in value)  # type: ignore[attr-defined]
        case origin if origin is Mapping:
            return isinstance(value, Mapping) and all(
                _fits(one, of)
                for pair in value.items()
                for one, of in zip(pair, arguments, strict=True)
            )
    if annotation in (int, float):
        number = Integral if annotation is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, annotation)


Model = Annotated[
    str | Path, Option("A Hugging Face model folder, or a hub id.", positional=True, read_as=str)
]
LayersFile = Annotated[
    str | Path | None,
    Option("A YAML file that says of the model's layers what their names do not.", is_first=False),
]
TableFile = Annotated[str | Path, Option("From `mofq measure`.", positional=True)]
AnyTable = Annotated["Table | str | Path", Option("From `mofq measure`.", positional=True)]
RecipeOutput = Annotated[
    str | Path | None, Option("The recipe, recipe.yaml.", short="-o", required=True)
]
Engine = Annotated[
    str | None,
    Option("A serving engine, of `mofq engines`; NAME:tp=4 on 4 devices.", is_first=True),
]
Space = Annotated[
    str | Path, Option("A search space: a name of `mofq spaces`, or a file.", read_as=str)
]
Device = Annotated[str, Option("Where the arithmetic runs: cpu, cuda, cuda:1 …")]
Execution = Annotated[
    Literal["auto", "resident", "streamed"],
    Option(
        "resident: the whole model in memory; streamed: layer by layer; auto: as it fits.",
        is_first=False,
    ),
]
#: Of the model that gradients flow through.
GradientExecution = Annotated[
    Literal["auto", "resident", "spread", "streamed"],
    Option(
        "resident: the whole model in memory; spread: over all devices, by accelerate; streamed: "
        "layer by layer; auto: resident or streamed, as it fits.",
        is_first=False,
    ),
]
DeviceModel = Annotated[
    str | None,
    Option("The device whose times are computed: h100 … of `mofq devices`, or a YAML file."),
]
Stats = Annotated[
    str | Path | None,
    Option("From `mofq calibrate`; needed where schemes are fitted (@nats, ~gptq, ~descent)."),
]
TuningStats = Annotated[
    str | Path | None,
    Option(
        "From `mofq calibrate`; needed where schemes are fitted (@nats, ~gptq, ~descent), and for "
        "codes that compensate the errors of layers before."
    ),
]
Sequences = Annotated[
    int | None,
    Option(
        "Sequences of each corpus; 32 by default, or as many as a text holds.",
        least=1,
        is_first=False,
    ),
]
Tokens = Annotated[
    int, Option("How many tokens of the text, at most, in windows spread over it.", least=2)
]
SequenceLength = Annotated[int, Option("Tokens of a window.", least=2)]
WindowBos = Annotated[
    Bos,
    Option("Begin windows with BOS: auto, where the tokenizer does; always or never."),
]
Recipes = Annotated[Sequence[str | Path], Option("Recipes to show or compare.", positional=True)]
Validations = Annotated[
    Sequence[str | Path], Option("From `mofq validate -o`; repeatable.", flag="--validation")
]
#: ``NAME=SOURCE`` each, or sources that name themselves, or names with their sources.
Corpora = Mapping[str, str] | Sequence[str]
#: ``LAYERS=VALUE`` each, or selectors with their values.
LayerValues = Mapping[str, str | float] | Sequence[str]
AnyRecipe = Annotated["Recipe | str | Path", Option("From `mofq search`.", positional=True)]

Objective = Annotated[
    Literal["mean", "worst-corpus"],
    Option("What is minimised: the mean over corpora, or the error of the worst (worst-corpus)."),
]
#: Corpus -> what it counts, or ``en=3,pt=1``.
CorpusWeights = Annotated[
    str | Mapping[str, float] | None,
    Option(
        "What each corpus counts in the mean, e.g. en=3,pt=1; by default the same.", read_as=str
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a recipe may cost."""

    max_bits: Annotated[
        float | None,
        Option("At most so many true bits per weight, scales included.", is_first=True),
    ] = None
    max_size: Annotated[
        str | float | None,
        Option(
            "At most so many bytes of the whole checkpoint, e.g. 5GB or 4.5GiB.",
            read_as=str,
            is_first=True,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        Option(
            "At most so many nats per token: the upper end of the predicted interval, or with a "
            "text the measured KL. Without a budget of size, the smallest model within it.",
            is_first=True,
        ),
    ] = None
    max_finer: Annotated[
        float | None,
        Option("At most this share of linear layers in other schemes than the space's base."),
    ] = None
    max_active_bits: Annotated[
        float | None,
        Option(
            "Of a mixture: at most so many true bits per weight that a token reads, experts by "
            "their share of tokens."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What some layers must have."""

    fixed: Annotated[
        LayerValues,
        Option(
            "LAYERS=SCHEME[,SCHEME]: these layers get this scheme, or one of these, e.g. "
            "'*.0.*=bf16'; repeatable.",
            flag="--fix",
            is_first=True,
        ),
    ] = ()
    at_least: Annotated[
        LayerValues,
        Option(
            "LAYERS=BITS or =GRANULARITY: these layers get at least so many bits, or scales as "
            "fine, e.g. '*.down_proj=8', 'first:2=8', 'attn.*=g64'; repeatable."
        ),
    ] = ()
    at_most: Annotated[
        LayerValues,
        Option("The same, but at most so many bits, or scales no finer; repeatable."),
    ] = ()


@dataclass(frozen=True, kw_only=True)  # no slots: it is one of two bases
class Cache:
    """What the KV cache may be kept in."""

    max_kv_bits: Annotated[
        float | None,
        Option("Decide the KV cache too: at most so many true bits per cached number."),
    ] = None
    kv_tokens: Annotated[
        int,
        Option("Decide the KV cache too: that of so many tokens counts into the size.", least=0),
    ] = 0
    kv_formats: Annotated[
        Sequence[str],
        Option(
            "A format that the KV cache may have, beside bf16; all measured ones by default; "
            "repeatable.",
            flag="--kv-cache",
        ),
    ] = ()

    @property
    def decides_cache(self) -> bool:
        """Whether the format of the KV cache is decided with the layers."""
        return self.max_kv_bits is not None or self.kv_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices(Cache, Constraints):
    """Which rows of a table count."""

    engine: Engine = None
    space: Annotated[str | None, Option("Only this search space of the table; all by default.")] = (
        None
    )
    unit: Annotated[
        str | None,
        Option(
            "The errors that are added up: kl_nats_per_token (by default, where measured), "
            "output_mse, tensor_mse or relative_weight_error."
        ),
    ] = None
    corpus_weights: CorpusWeights = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The time of a forward pass, told or kept."""

    max_time: Annotated[
        str | None,
        Option("At most this time of the workload on the device, by its peak rates, e.g. 12ms."),
    ] = None
    device_model: DeviceModel = None
    workload: Annotated[
        str | None,
        Option("Whose time: decode:batch=8,context=1024 or prefill:prompt=2048; ,tp=N."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a recipe is looked for."""

    solver: Annotated[
        Literal["exact", "greedy", "optuna"],
        Option("exact: proven best; greedy: one layer after the other; optuna: by trials."),
    ] = "exact"
    objective: Objective = "mean"
    ties: Annotated[
        Literal["on", "off"],
        Option("on: where two schemes differ by no more than noise, the simpler one; off."),
    ] = "on"
    refine: Annotated[
        int, Option("Measure so many swaps on the model, keep what is better.", least=0)
    ] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is minimised over several corpora."""

    objective: Objective = "mean"
    corpus_weights: CorpusWeights = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The part of a text that models are compared on."""

    tokens: Tokens = 8192
    sequence_length: SequenceLength = 512
    bos: WindowBos = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class OnModel:
    """What measures a recipe on the model itself; its windows begin as those that calibrated."""

    model: Annotated[
        str | Path | None,
        Option(
            "The model, where recipes are measured: --refine, --solver optuna, --max-kl.",
            read_as=str,
        ),
    ] = None
    text: Annotated[
        str | None,
        Option("What recipes are measured on; neither what calibrates nor what validates."),
    ] = None
    tokens: Tokens = 4096
    sequence_length: SequenceLength = 512
    device: Device = "cpu"
    execution: Execution = "auto"
    stats: Stats = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The trials of the solver optuna."""

    trials: Annotated[int, Option("Trials of optuna, earlier ones included.", least=1)] = 60
    multi_objective: Annotated[bool, Option("Of optuna: true bits as a second objective.")] = False
    trial: Annotated[
        int | None, Option("Of --multi-objective: take the recipe of this trial.", least=0)
    ] = None
    storage: Annotated[
        str | None,
        Option(
            "Where optuna keeps trials: a URL, an SQLite or journal file; beside -o by default."
        ),
    ] = None
    workers: Annotated[int, Option("Processes of optuna.", least=1)] = 1
    seed: Annotated[int, Option("Of optuna's proposals.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What models are run in, and where."""

    dtype: Annotated[str, Option("What models are run in: float32 or bfloat16.")] = "float32"
    device: Device = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Where(Running):
    """Work on other machines."""

    cluster: Annotated[
        str | None, Option("Work on a Ray cluster: 'ray' (on this machine), or ray://HOST:PORT.")
    ] = None
    cluster_cpus: Annotated[int, Option("CPUs of each worker of --cluster.", least=1)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which matrices of the vocabulary get schemes too."""

    lm_head: Annotated[bool, Option("Quantize the lm_head too.")] = False
    embeddings: Annotated[
        bool,
        Option(
            "Quantize the embedding too; where it is the lm_head too, either option asks for it."
        ),
    ] = False

    @property
    def asked(self) -> Included:
        """What `find_layers` is told."""
        return {"include_lm_head": self.lm_head, "include_embeddings": self.embeddings}

    def and_of(self, space: SearchSpace) -> Vocabulary:
        """These, and those that a search space names by its keys."""
        return Vocabulary(
            lm_head=self.lm_head or space.lm_head, embeddings=self.embeddings or space.embeddings
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpts:
    """What is drawn from a calibration text."""

    sequences: Sequences = None
    sequence_length: Annotated[int, Option("Tokens of a sequence.", least=2)] = 512
    bos: WindowBos = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples(Excerpts):
    """What is kept of a calibration text."""

    keep: Annotated[int, Option("Sequences whose inputs and gradients are kept.", least=1)] = 8
    inputs: Annotated[
        Literal["auto", "all", "kept"],
        Option(
            "What codes can be fitted to: the inputs of all sequences, or of those that are kept; "
            "auto: all, where they take at most 8 GB."
        ),
    ] = "auto"
    seed: Annotated[int, Option("Of the labels that gradients are drawn for.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LmEval:
    """Tasks by which lm-eval scores both models, beside the text."""

    tasks: Annotated[Sequence[str], Option("lm-eval tasks, by commas or repeated.")] = ()
    task_folder: Annotated[
        str | Path | None, Option("A folder of further tasks, in lm-eval's format.")
    ] = None
    task_limit: Annotated[int | None, Option("Items of each task.", least=1)] = None
