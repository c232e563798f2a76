"""The bundled model that `mofq demo` and the tests use; only where it is.

`model/README.md` says how the model was made, how good it is, and the licence of model and texts.
The texts are `mofq.evidence.corpora.BUNDLED_TEXT`.
"""

from __future__ import annotations

from pathlib import Path


def demo_model_folder() -> Path:
    """The Hugging Face folder of the bundled model: a small trained Llama in bfloat16."""
    return Path(__file__).parent / "model"
