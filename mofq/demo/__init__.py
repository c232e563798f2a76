"""The bundled model and texts that `mofq demo` and the tests use; only where they are.

`model/README.md` says how the model was made, how good it is, and the licence
of model and texts.
"""

from __future__ import annotations

from pathlib import Path

from mofq.exceptions import CorpusError, nearest_name

LANGUAGES = ("en", "pt")
SPLITS = ("heldout", "calibration")


def demo_model_folder() -> Path:
    """The Hugging Face folder of the bundled model: a small trained Llama in bfloat16."""
    return Path(__file__).parent / "model"


def demo_text(language: str, split: str = "heldout") -> Path:
    """A bundled UTF-8 text, paragraphs separated by blank lines.

    Args:
        language: ``"en"`` English or ``"pt"`` Brazilian Portuguese.
        split: ``"heldout"``, about 30 kB that the model never saw, for
            validation; or ``"calibration"``, about 40 kB of its training text.

    Returns:
        The file's path.

    Raises:
        CorpusError: There is no such language or split.
    """
    for what, name, known in (("language", language, LANGUAGES), ("split", split, SPLITS)):
        if name not in known:
            raise CorpusError(
                f"The bundled texts have no {what} {name!r}.{nearest_name(name, known)}"
            )
    return Path(__file__).parent / "texts" / f"{split}-{language}.txt"
