"""How the command line spells options in messages: as flags."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from mofq import api
from mofq.api.options import parameters_of
from mofq.exceptions import Remark


def flag_of(name: str) -> str:
    """The flag of an option, for messages: of the stage that has one under this name."""
    return _flags().get(name, default_flag(name))


@cache
def _flags() -> Mapping[str, str]:
    """Options of all stages that are called otherwise than their names."""
    stages = (getattr(api, name) for name in api.__all__)
    options = [one for stage in stages if inspect.isfunction(stage) for one in parameters_of(stage)]
    named = {one.name: one.option.short or one.option.flag for one in options}
    return {name: flag for name, flag in named.items() if flag is not None}


def default_flag(name: str) -> str:
    """The flag of an option that does not name one: ``max_bits`` as ``--max-bits``."""
    return "--" + name.replace("_", "-")


def with_flags(content: Any) -> Any:
    """A text, or what `to_json` of a result gives, with options in remarks as flags."""
    if isinstance(content, Remark):
        return content.spelled(flag_of)
    if isinstance(content, Mapping):
        return {key: with_flags(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [with_flags(value) for value in content]
    return content
