"""mofq: layer-wise mixtures of number formats for language models.

Importing this package imports neither torch nor transformers; the functions
below do so when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe as Recipe
    from mofq.decision.recipe import load_recipe as load_recipe
    from mofq.delivery.backends import apply_recipe as apply_recipe

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "mofq.decision.recipe",
    "load_recipe": "mofq.decision.recipe",
    "apply_recipe": "mofq.delivery.backends",
}

__all__ = ["Recipe", "__version__", "apply_recipe", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import a public function on first use, so that ``import mofq`` stays cheap."""
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mofq' has no attribute {name!r}")
