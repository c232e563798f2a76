"""Names of schemes as a kernel, or the config of an export, sees them."""

from __future__ import annotations

import re

from mofq.numbers.schemes import Scheme, parse_scheme

_RULE_AND_ROUNDING = re.compile(r"@[a-z]+|~[a-z]+")


def format_name(scheme: Scheme) -> str:
    """The scheme's name without scale rule and rounding of its weights: what a kernel sees."""
    weight, plus, activation = scheme.name.partition("+")
    weight = _RULE_AND_ROUNDING.sub("", weight).replace(".s-e8m0ceil", ".s-e8m0")
    return parse_scheme(weight).name + plus + activation
