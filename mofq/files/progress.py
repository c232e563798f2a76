"""How a long stage tells how far it is."""

from collections.abc import Callable

#: Called with the stage's name, the number of steps done and the number of steps in all.
Progress = Callable[[str, int, int], None]
