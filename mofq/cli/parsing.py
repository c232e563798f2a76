"""Makes a command out of a function of `mofq.api`: its parameters become arguments and flags."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from mofq.api.options import Option
from mofq.cli.show.terminal import Bars, note, print_json

#: What a function may take beside its options: how far it is, and what a user should know.
_REPORTS = ("progress", "tell")
_JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument or flag of a command."""

    name: str
    group: str | None  #: parameter of the function that it is a field of; None: of none
    option: Option
    type: Any  #: of what the command line reads
    default: Any  #: `inspect.Parameter.empty` where the command line has none

    def as_typer(self) -> inspect.Parameter:
        """The same as typer takes it."""
        if self.option.positional:
            info: Any = typer.Argument(help=self.option.help)
        else:
            flag = self.option.flag or "--" + self.name.replace("_", "-")
            names = [flag] if self.option.short is None else [flag, self.option.short]
            info = typer.Option(*names, help=self.option.help, min=self.option.least)
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=Annotated[self.type, info],
        )


def parameters_of(function: Callable[..., Any]) -> Iterator[Parameter]:
    """The options of a function, those of a group one by one.

    Args:
        function: Its parameters are annotated with an `Option`, or are groups of such fields.
            What is neither is no option of the command line.
    """
    annotations = inspect.get_annotations(function, eval_str=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = annotations[name]
        if isinstance(annotation, type) and is_dataclass(annotation):
            types = inspect.get_annotations(annotation, eval_str=True)
            for field in fields(annotation):
                default = getattr(parameter.default, field.name)
                yield _parameter(field.name, types[field.name], default, group=name)
        elif hasattr(annotation, "__metadata__"):
            yield _parameter(name, annotation, parameter.default)


def _parameter(name: str, annotation: Any, default: Any, *, group: str | None = None) -> Parameter:
    (option,) = annotation.__metadata__
    written = option.written_as or get_args(annotation)[0]
    if get_origin(written) is Literal:
        written = str  # The function refuses an unknown word, and names the nearest one.
    if option.required:
        default = inspect.Parameter.empty
    return Parameter(
        name, group, option, written if default is not None else written | None, default
    )


def as_command(
    function: Callable[..., Any],
    show: Callable[[Any], None],
    *,
    ending: Callable[[Any], int] | None = None,
) -> Callable[..., None]:
    """A function that typer makes a command of.

    Args:
        function: Of `mofq.api`; its result has ``to_json``, which ``--json`` prints.
        show: Prints the result for people.
        ending: Has the last word after either, and gives the exit code.

    Returns:
        The command; its help is the first sentence of the function's docstring.
    """
    parameters = tuple(parameters_of(function))
    reports = [name for name in _REPORTS if name in inspect.signature(function).parameters]

    def command(*, json: bool, **values: Any) -> None:
        with Bars() as bars:
            sinks = {"progress": bars.stage, "tell": note}
            told = {name: sinks[name] for name in reports}
            result = function(**_arguments(function, parameters, values), **told)
        if json:
            print_json(result.to_json())
        else:
            show(result)
        code = 0 if ending is None else ending(result)
        if code:
            sys.exit(code)

    json = inspect.Parameter(
        "json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON
    )
    typed = [one.as_typer() for one in parameters]
    command.__signature__ = inspect.Signature([*typed, json])  # type: ignore[attr-defined]
    command.__doc__ = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return command


def _arguments(
    function: Callable[..., Any], parameters: Iterable[Parameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What was read, as the function takes it: groups whole, lists as tuples."""
    arguments: dict[str, Any] = {}
    grouped: dict[str, dict[str, Any]] = {}
    for one in parameters:
        value = values[one.name]
        into = arguments if one.group is None else grouped.setdefault(one.group, {})
        into[one.name] = tuple(value) if isinstance(value, list) else value
    types = inspect.get_annotations(function, eval_str=True)
    return arguments | {name: types[name](**fields) for name, fields in grouped.items()}
