"""In what a model may compute."""

from __future__ import annotations

from mofq.exceptions import CheckpointError, nearest_name, option

#: Names of torch's dtypes.
DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype.

    Raises:
        CheckpointError: As said.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"{option('dtype', dtype)}: not known." + nearest_name(dtype, DTYPES))
