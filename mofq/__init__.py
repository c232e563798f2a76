"""mofq: layer-wise mixtures of number formats for language models.

``mofq.search(…)`` and the other stages of the flow are functions of `mofq.api`. Importing this
package imports neither torch nor transformers; its functions do so when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mofq.api.calibrate import calibrate as calibrate
    from mofq.api.export import export as export
    from mofq.api.frontier import frontier as frontier
    from mofq.api.inspect import inspect as inspect
    from mofq.api.measure import measure as measure
    from mofq.api.options import Budget as Budget
    from mofq.api.options import Choices as Choices
    from mofq.api.rewrite import rewrite as rewrite
    from mofq.api.run import run as run
    from mofq.api.search import search as search
    from mofq.api.validate import validate as validate
    from mofq.decision.recipe import Recipe as Recipe
    from mofq.decision.recipe import load_recipe as load_recipe
    from mofq.delivery.backends import apply_recipe as apply_recipe

__version__ = "0.1.0"

_STAGES = (
    "Budget",
    "Choices",
    "calibrate",
    "export",
    "frontier",
    "inspect",
    "measure",
    "rewrite",
    "run",
    "search",
    "validate",
)
_PUBLIC = {
    **dict.fromkeys(_STAGES, "mofq.api"),
    "Recipe": "mofq.decision.recipe",
    "load_recipe": "mofq.decision.recipe",
    "apply_recipe": "mofq.delivery.backends",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import mofq`` stays cheap."""
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mofq' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, so that a notebook completes them."""
    return sorted(__all__)
