"""The bundled models that `mofq demo` and the tests use; only where they are.

The `README.md` of each says how it was made, how good it is, and the licence of model and texts.
The texts are `mofq.evidence.corpora.BUNDLED_TEXT`.
"""

from __future__ import annotations

from pathlib import Path


def demo_model_folder() -> Path:
    """The Hugging Face folder of the bundled model: a small trained Llama in bfloat16."""
    return Path(__file__).parent / "model"


def demo_mixture_folder() -> Path:
    """That of the mixture of experts beside it: a small trained Qwen3-MoE of the same text."""
    return Path(__file__).parent / "mixture"
