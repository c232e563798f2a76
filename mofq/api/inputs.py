"""Opens what the stages are given: tables, recipes and texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mofq.api.options import Corpora, Tell, Vocabulary, silent
from mofq.exceptions import CorpusError

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.evidence.corpora import Corpus
    from mofq.evidence.table import Table
    from mofq.model.checkpoint.headers import Checkpoint
    from mofq.model.layers import ModelLayers

#: In the text of a recipe, the file of what it was tuned to.
_NAMES_TUNED = rb"(?m)^  file: (tuned-[0-9a-f]{16}\.\w+)$"


def open_table(table: Table | str | Path, tell: Tell) -> Table:
    """Read a table; tell where its errors are not what this mofq would measure.

    Raises:
        TableError: It is missing or damaged.
    """
    from mofq.evidence.table import Table, read_table
    from mofq.numbers.numerics import NUMERICS

    if isinstance(table, Table):
        return table
    opened = read_table(Path(table))
    found = opened.header.numerics
    if found != NUMERICS:
        when = f"by numerics {found}" if found else "before numerics were noted"
        tell(
            f"{table}: measured {when}, and this mofq has numerics {NUMERICS}: do not compare its "
            f"errors with those of newer tables."
        )
    if apart := _joined_apart(opened):
        tell(
            f"{table}: {', '.join(apart)} are in different fusion groups, and this mofq joins them "
            f"as engines do: it was changed since the table was measured. It refuses recipes that "
            f"give them different schemes. Measure into another table."
        )
    return opened


def _joined_apart(table: Table) -> tuple[str, ...]:
    from mofq.model.layers.joining import joined_apart

    model = table.header.model
    if model.layers is not None:  # joined as the user said
        return ()
    groups = {
        group.name: [(layer.name, layer.in_features) for layer in group.layers]
        for group in table.header.groups
    }
    return joined_apart(groups, model.model_type)


def open_layers(
    checkpoint: Checkpoint, vocabulary: Vocabulary, layers: str | Path | None
) -> ModelLayers:
    """Find the layers of a model that get schemes.

    Args:
        checkpoint: The model.
        vocabulary: Which matrices of the vocabulary are among them.
        layers: The file in which the user says what names do not; None: there is none.

    Raises:
        CheckpointError: The file is missing or not valid, or what a layer is remains unknown.
    """
    from mofq.model.layers import find_layers, load_layers

    stated = None if layers is None else load_layers(layers)
    return find_layers(checkpoint, **vocabulary.asked, stated=stated)


def open_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Read a recipe that is not in memory yet.

    Raises:
        RecipeError: It is missing or not valid.
    """
    from mofq.decision.recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))


def save_recipe(recipe: Recipe, path: Path, tell: Tell) -> None:
    """Write a recipe; tell where it takes the place of another one, which may be edited by hand.

    What that was tuned to stays: a copy of it elsewhere may need the file yet, which takes long.

    Raises:
        RecipeError: The recipe would not be read back as it is.
        MofqError: The file cannot be written.
    """
    from mofq.decision.recipe import recipe_text, write_recipe

    before, text = path.read_bytes() if path.is_file() else b"", recipe_text(recipe)
    write_recipe(recipe, path)
    if before and before != text.encode():
        tell(f"{path}: replaces what was in this file.")
    named = re.search(_NAMES_TUNED, before)
    if named and named[1].decode() not in text and (path.parent / named[1].decode()).is_file():
        tell(
            f"{path.parent / named[1].decode()}: what the recipe before was tuned to. It stays; "
            f"delete it where no other recipe names it."
        )


def load_named(source: str) -> Corpus:
    """A corpus from ``NAME=SOURCE``, or from a source that names itself."""
    from mofq.evidence.corpora import load_text

    name, rest = _named(source)
    return load_text(rest, name=name)


def text_file(source: str) -> str:
    """The path in a source of text, where it is a file: no name before it, no column after it."""
    _, rest = _named(source)
    return rest if Path(rest).exists() else rest.partition(":")[0]


def _named(source: str) -> tuple[str | None, str]:
    name, equals, rest = source.partition("=")
    return (name, rest) if equals and not Path(source).exists() else (None, source)


def load_corpora(corpora: Corpora, tell: Tell = silent) -> list[Corpus]:
    """Corpora of different names, each fit to be a folder's; tell what was left out of them.

    Raises:
        CorpusError: One cannot be read, or its name is no folder's, or two have one name.
    """
    from mofq.evidence.corpora import CORPUS_NAME

    if isinstance(corpora, Mapping):
        corpora = [f"{name}={source}" for name, source in corpora.items()]
    texts = [load_named(one) for one in corpora]
    for text in texts:
        if not re.match(CORPUS_NAME, text.name):
            raise CorpusError(
                f"corpus {text.name!r}: the name is that of a folder in the stats, so it has no "
                f"slash and does not begin with a dot. Write NAME={text.source}."
            )
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise CorpusError(f"two corpora have the name {name!r}. Write NAME=FILE for each.")
    for text in texts:
        for remark in text.remarks():
            tell(remark)
    return texts
