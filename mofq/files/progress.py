"""How a long stage tells how far it is, and what a user should read meanwhile."""

from collections.abc import Callable

#: Called with the stage's name, the number of steps done and the number of steps in all.
Progress = Callable[[str, int, int], None]
#: Called with remarks of one line, which a user should read.
Tell = Callable[[str], None]


def silent(message: str) -> None:
    """Tell nobody: where the caller of a stage wants no remarks."""
