"""Makes a command out of a function of `mofq.api`: its options become arguments and flags."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ForwardRef, Literal, get_args, get_origin

import typer

from mofq.api.options import OTHERS, Parameter, parameters_of
from mofq.cli.flags import default_flag, flag_of
from mofq.cli.show.terminal import Bars, note, print_json
from mofq.exceptions import MofqError

#: Wrong usage: click's, which typer imports or brings with it, by version.
UsageError: Any = typer.BadParameter.__base__
_JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


class SectionedCommand(typer.core.TyperCommand):
    """A command whose help has the options that matter most first, others under titles."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a list of options for each section."""
        for title, records in sections(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(records)


def sections(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Title -> what each argument or option is called, and its help."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in command.get_params(context):
        first = "Arguments" if param.param_type_name == "argument" else "Options"
        record = param.get_help_record(context)
        if record is not None:
            title = getattr(param, "rich_help_panel", None) or first
            found.setdefault(title, []).append(record)
    last = {OTHERS: found.pop(OTHERS, [])}
    return {title: records for title, records in (found | last).items() if records}


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

    def command(*, json: bool, **values: Any) -> None:
        with Bars() as bars:
            reports = {"progress": bars.stage, "tell": note}
            taken = reports.keys() & inspect.signature(function).parameters.keys()
            arguments = _arguments(function, parameters, values)
            try:
                result = function(**arguments, **{name: reports[name] for name in taken})
            except MofqError as error:
                raise type(error)(error.spelled(flag_of)) from error
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
    typed = [*map(_as_typer, parameters), json]
    command.__signature__ = inspect.Signature(typed)  # type: ignore[attr-defined]
    command.__doc__ = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return command


def _as_typer(parameter: Parameter) -> inspect.Parameter:
    option, default = parameter.option, parameter.default
    read_as = option.read_as or _read_as(parameter.annotation)
    if option.positional:
        info: Any = typer.Argument(help=option.help)
    else:
        flag = option.flag or default_flag(parameter.name)
        names = [flag] if option.short is None else [flag, option.short]
        info = typer.Option(
            *names,
            help=option.help,
            min=option.least,
            metavar=_metavar(parameter.annotation, read_as),
            rich_help_panel=parameter.section,
        )
    if option.required:
        default = inspect.Parameter.empty
    if default is None:
        read_as = read_as | None
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[read_as, info],
    )


def _read_as(annotation: Any) -> Any:
    """The type that a text is read as, for a parameter that Python gives other types too."""
    members = get_args(annotation)
    if get_origin(annotation) is Literal:
        return str  # The function refuses an unknown word, and names the nearest one.
    for one in (annotation, *members):
        if get_origin(one) is Sequence:
            return list[_read_as(get_args(one)[0])]  # type: ignore[misc]
    # What Python may hold in memory, and names by a forward reference, is a file to the shell.
    return Path if Path in members or isinstance(annotation, ForwardRef | str) else annotation


def _metavar(annotation: Any, read_as: Any) -> str | None:
    """What ``--help`` shows in the place of a value; None: there is none."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = {int: "number", float: "number", str: "text", Path: "path"}
    one = next((one for one in (*get_args(read_as), read_as) if one in kinds), None)
    return None if one is None else f"<{kinds[one]}>"


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
