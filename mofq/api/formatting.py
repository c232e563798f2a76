"""Figures as people read them: sizes, and values with their standard errors or intervals."""

from __future__ import annotations

import math


def short_bytes(count: int) -> str:
    """``269.1 MB``: decimal units, four digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def signed_error(value: float, stderr: float | None) -> str:
    """A difference: ``+0.0412 ± 0.0031``."""
    return ("+" if value >= 0 else "") + with_error(value, stderr)


def with_error(value: float | None, stderr: float | None) -> str:
    """``0.0412 ± 0.0031``, two digits of the error; or a dash."""
    if value is None:
        return "–"
    if not stderr:
        return f"{value:.3g}"
    if abs(value) < 1e-4:
        return f"{value:.2g} ± {stderr:.1g}"
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def with_interval(
    value: float | None, low: float | None, high: float | None, *, stderr: float | None = None
) -> str:
    """``0.0412 (0.0370 to 0.0454)``, a predicted value with its 95 % interval.

    Args:
        value: None is a dash.
        low: None where no interval is known, as in recipes of before there was one.
        high: As ``low``.
        stderr: Shown in place of an interval that is not known.
    """
    if value is None or low is None or high is None or not high > low:
        return with_error(value, stderr)
    width = (high - low) / 2
    if value < 1e-4:
        return f"{value:.2g} ({low:.2g} to {high:.2g})"
    decimals = max(0, 1 - math.floor(math.log10(width)))
    return f"{value:.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f})"
