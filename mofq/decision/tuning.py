"""What a recipe says of norms that were tuned, and codes learned, after it was found.

The tensors are in a file beside the recipe, in the format of safetensors and under the names that
the checkpoint has them by. The file's name is no ``*.safetensors``: engines read every file of that
ending in a model's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, Strict

from mofq.files.validated import Count, Index, Name, NotNegative, Sha256, Text, only_these_keys

#: The name of a file says its content, so that recipes of one folder do not share one by mistake.
TUNED_FILES = "tuned-*.tensors"


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Where what was tuned is, how it came about, and what it was measured to gain."""

    #: beside the recipe
    file: Annotated[str, Strict(), Field(pattern=r"^tuned-[0-9a-f]{16}\.(tensors|norms)$")]
    sha256: Sha256  #: of the file
    decisions_sha256: Sha256  #: of what it was tuned for, see `Recipe.decisions_sha256`
    mofq: Name
    tensors: Index  #: norms, gains and biases
    layers: Index = 0  #: whose codes and scales were learned
    compensated: Index = 0  #: layers whose codes make up for the errors of layers before
    steps: Index  #: of learning; 0: codes were compensated alone
    sequences: Count  #: that were stepped on, of all corpora
    sequence_length: Count
    bos: Annotated[bool, Strict()]  #: whether every sequence begins with it
    #: hashes of the texts, the first digits of each, by commas
    corpora_sha256: Text
    held_out: Count  #: sequences that had no part in tuning, on which follows:
    kl_before: NotNegative  #: measured, before tuning [nats per token]
    kl_after: NotNegative
    kl_saved_stderr: NotNegative  #: of the difference, sequence by sequence

    def to_json(self) -> dict[str, int | float]:
        """What was measured, for machines."""
        return {
            "norms": self.tensors,
            "layers": self.layers,
            "compensated": self.compensated,
            "held_out": self.held_out,
            "kl_before": self.kl_before,
            "kl_after": self.kl_after,
            "kl_saved_stderr": self.kl_saved_stderr,
        }

    @property
    def what(self) -> str:
        """What was tuned, for people."""
        found = []
        if self.compensated:
            found.append(f"codes of {self.compensated} layers compensate errors of those before")
        if self.steps and self.layers:
            found.append(f"codes and scales of {self.layers} layers learned")
        if self.steps:
            found.append(f"{self.tensors} norms tuned")
        return ", ".join(found)

    @property
    def gain(self) -> str:
        """What was gained on the sequences held out, for people."""
        # Of a recipe that changes nothing there is no share.
        change, share = self.kl_after - self.kl_before, 100 / (self.kl_before or 1.0)
        return (
            f"{self.kl_before:.3g} to {self.kl_after:.3g} nats per token, "
            f"{share * change:.1f} ± {share * self.kl_saved_stderr:.1f} %, on {self.held_out} "
            f"held-out sequences of the text that it was tuned on"
        )


def tuned_file(sha256: str) -> str:
    """The name of a file with this hash."""
    return TUNED_FILES.replace("*", sha256[:16])


def beside(recipe: str | Path, tuning: Tuning) -> Path:
    """Where the file of a recipe is."""
    return Path(recipe).parent / tuning.file
