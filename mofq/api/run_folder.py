"""The folder of `mofq run`: statistics and table once, and the results of each request by name.

The first request has the plain names: ``recipe.yaml``, ``validation.json``, ``model``. Those of
another budget, engine, space, effort or constraint on layers, or of corpora that count otherwise,
say in their names how they differ: ``recipe-5.0bits.yaml``, ``validation-5.0bits.json``,
``model-5.0bits``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Self

from mofq.api.formatting import short_bytes
from mofq.api.request import read_corpus_weights
from mofq.exceptions import BackendError, MofqError, TableError, option

if TYPE_CHECKING:
    from mofq.decision import Request
    from mofq.decision.recipe import Recipe
    from mofq.delivery.validation import Validation
    from mofq.evidence.spaces import SearchSpace
    from mofq.evidence.table import TableSpace

#: The recipe that was searched for, among the candidates of a run.
SEARCHED = "recipe"
#: What it is called where a uniform scheme took its place.
_MIXTURE = "mixture"
_RECIPE = "recipe.yaml"
_VALIDATION = "validation.json"
#: The checkpoint for an engine.
_MODEL = "model"
#: Key of a recipe's budget -> what follows its figure in the name of a file.
_UNITS = {
    "bits_per_weight": "bits",
    "checkpoint_bytes": "B",
    "kl_nats_per_token": "nats",
    "finer_fraction": "finer",
}
#: Characters of a name that say constraints; more of them are said by their hash.
_LONGEST_PART = 60
#: Of the free disk, what statistics or a rewritten model may take; the rest is for what is exported
#: and in between.
_SHARE_OF_DISK = 0.5
_UNFIT = re.compile(r"[^A-Za-z0-9.=,@+-]")


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Where the results of one request lie."""

    folder: Path
    suffix: str = ""  #: of their names; "" for the first request of the folder

    @property
    def stats(self) -> Path:
        """The statistics, of all requests."""
        return self.folder / "stats"

    @property
    def tuning(self) -> Path:
        """Where a tuning that was stopped goes on, and what it found is kept until the run ends."""
        return self.folder / ".tuning"

    @property
    def validating(self) -> Path:
        """What a validation layer by layer keeps until the run ends: its export may fail."""
        return self.folder / ".streamed"

    @property
    def table(self) -> Path:
        """What was measured, for all requests."""
        return self.folder / "table.jsonl"

    @property
    def recipe(self) -> Path:
        """The decision."""
        return self.named(_RECIPE)

    @property
    def validation(self) -> Path:
        """What recipe and alternatives measure."""
        return self.named(_VALIDATION)

    @property
    def model(self) -> Path:
        """The checkpoint, where the engine loads one."""
        return self.named(_MODEL)

    def named(self, name: str) -> Path:
        """A file of the request: ``recipe.yaml`` as ``recipe-5.0bits.yaml``."""
        path = Path(name)
        return self.folder / f"{path.stem}{self.suffix}{path.suffix}"


@dataclass(frozen=True, slots=True)
class NotedRequest:
    """What a run is asked for, as far as recipes note it."""

    budget: Mapping[str, object]
    engine: str | None
    space: str | None
    space_sha256: str | None
    corpus_weights: str | None  #: in lowest terms, corpora by name; None: all the same
    objective: str = "mean"  #: over corpora
    #: On layers, of the space and the request, each once in the order of their text.
    constraints: tuple[str, ...] = ()
    effort: str = "quick"  #: that of versions before there was another

    @classmethod
    def of_request(cls, request: Request, space: SearchSpace, *, effort: str = "quick") -> Self:
        """What a run asks for, before it has a table; of the space that the table will note."""
        from mofq.decision.make_recipe import budget_figures
        from mofq.decision.request import lowest_terms

        return cls(
            budget_figures(request),
            request.engine,
            _plain(request.space),
            space.sha256,
            lowest_terms(request.corpus_weights),
            request.objective,
            _in_order(map(str, (*space.constraints, *request.constraints))),
            effort,
        )

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Self:
        """What a former run asked for."""
        from mofq.decision.request import lowest_terms

        def noted(key: str) -> str | None:
            value = recipe.made_by.get(key)
            return None if value is None else str(value)

        constraints = noted("constraints")
        return cls(
            dict(recipe.budget),
            noted("engine"),
            _plain(noted("space")),
            noted("space_sha256"),
            lowest_terms(read_corpus_weights(noted("corpus_weights"))),
            noted("objective") or "mean",
            _in_order(constraints.split("; ") if constraints else ()),
            noted("effort") or "quick",
        )

    def differences_from(self, other: NotedRequest) -> list[str]:
        """What sets this apart from another request, as parts of names; none: they are one."""
        parts = []
        if self.engine != other.engine:
            parts.append(self.engine or "no-engine")
        if self.space != other.space:
            parts.append(self.space or "no-space")
        if self.corpus_weights != other.corpus_weights:
            parts.append(self.corpus_weights or "equal-weights")
        if self.objective != other.objective:
            parts.append(self.objective)
        if self.constraints != other.constraints:
            parts.append(self._constraints_part())
        if self.effort != other.effort:
            parts.append(self.effort)
        if parts or self.budget != other.budget:
            parts = [*self._budget_parts(), *parts]
        return [_UNFIT.sub("-", part) for part in parts]

    def has_changed_space(self, other: NotedRequest) -> bool:
        """Whether the search space is another one than that of the same name was."""
        hashes = {self.space_sha256, other.space_sha256}
        is_named_so = self.space == other.space and self.has_twins == other.has_twins
        return is_named_so and None not in hashes and len(hashes) > 1

    @property
    def has_twins(self) -> bool:
        """Whether the space is one with fitted twins, which has a name and hash of its own."""
        return self.effort != "quick"

    def _budget_parts(self) -> list[str]:
        parts = [f"{value}{_UNITS[key]}" for key, value in self.budget.items()]
        return parts or ["no-budget"]

    def _constraints_part(self) -> str:
        """In words, or where these are long by their hash."""
        text = ",".join(self.constraints)
        if len(text) > _LONGEST_PART:
            return f"constraints-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return text or "no-constraints"

    def __str__(self) -> str:
        """For messages."""
        limits = [f"{name} {value}" for name, value in self.budget.items()] or ["no budget"]
        asked = [*limits, f"space {self.space or 'not noted'}"]
        asked.append(f"engine {self.engine or 'not named'}")
        if self.corpus_weights:
            asked.append(f"corpus weights {self.corpus_weights}")
        if self.objective != "mean":
            asked.append(f"objective {self.objective}")
        if self.effort != "quick":
            asked.append(f"effort {self.effort}")
        if self.constraints:
            asked.append(f"constraints {'; '.join(self.constraints)}")
        return ", ".join(asked)


def _plain(space: str | None) -> str | None:
    """The name of a space, of one with fitted twins that of the space that they were added to."""
    from mofq.evidence.fitted_space import FITTED_SUFFIX

    return None if space is None else space.removesuffix(FITTED_SUFFIX)


def _in_order(constraints: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(constraints)))


def find_files(folder: Path, asked: NotedRequest, space: TableSpace) -> RunFiles:
    """Where the results of a request lie, or will.

    Args:
        folder: Of all requests.
        asked: What this one asks for.
        space: Its search space, as the table would note it.

    Raises:
        BackendError: There is a model that no run wrote.
        RecipeError: A recipe that is there cannot be read.
        TableError: The table that is there cannot be read, or has other numerics.
        MofqError: What has the request's name is of another one or was edited, its recipe and its
            model were tuned otherwise, or the search space is another than when its schemes
            were measured here, and not that one with more schemes.
    """
    first = RunFiles(folder)
    _check_numerics(first.table)
    for files in dict.fromkeys((first, *finished_runs(folder))):
        for path, recipe in former_recipes(files).items():
            found = NotedRequest.of_recipe(recipe)
            if asked.has_changed_space(found) and not _continues(space, first.table):
                raise MofqError(
                    f"{path}: was decided in the search space {asked.space} as it was then, "
                    f"and its schemes are in the table there. Run with another {option('output')}."
                )
    former = list(former_recipes(first).values())
    different = asked.differences_from(NotedRequest.of_recipe(former[0])) if former else []
    files = RunFiles(folder, "-" + "-".join(different)) if different else first
    formers = former_recipes(files)
    if len({recipe.tuning for recipe in formers.values()}) > 1:
        raise MofqError(
            f"{files.recipe}: was tuned otherwise than {files.model}, or only one of the two "
            f"is tuned. Move the other one away, or run with another {option('output')}."
        )
    for path, recipe in formers.items():
        if recipe.is_edited:
            raise MofqError(
                f"{path}: was edited after it was found, and this run would end with what was "
                f"found. Run with another {option('output')}, or move {files.recipe.name}, "
                f"{files.validation.name} and {files.model.name} away."
            )
        found = NotedRequest.of_recipe(recipe)
        if asked.differences_from(found):
            raise MofqError(
                f"{path}: is the result for {found}, and this run asks for {asked}. Run with "
                f"another {option('output')}, or move it away."
            )
    return files


def _check_numerics(table: Path) -> None:
    """Refuse, before anything runs, a table that nothing can be added to."""
    from mofq.evidence.table import read_table
    from mofq.numbers.numerics import NUMERICS

    if table.is_file() and (found := read_table(table).header.numerics) != NUMERICS:
        raise TableError(
            f"{table}: was measured by numerics {found or '(not noted)'}, and this mofq measures "
            f"by numerics {NUMERICS}. It can be searched and explored as it is; run with another "
            f"{option('output')}."
        )


def _continues(space: TableSpace, table: Path) -> bool:
    """Whether a table takes a search space: it has none of its name, or the space extends it."""
    from mofq.evidence.table import read_table

    return not table.is_file() or all(
        space.extends(one) for one in read_table(table).spaces if one.name == space.name
    )


def former_recipes(files: RunFiles) -> dict[Path, Recipe]:
    """The recipes that a former run of the request ended with: its own, and that of the model.

    Raises:
        BackendError: There is a model that no run wrote.
        RecipeError: A recipe cannot be read.
    """
    from mofq.decision.recipe import RECIPE_FILE, load_recipe

    model = files.model
    inside = model / RECIPE_FILE
    if model.exists() and any(model.iterdir()) and not inside.is_file():
        raise BackendError(
            f"{model}: holds something that no `mofq run` wrote. Run with another "
            f"{option('output')}, or remove it."
        )
    return {path: load_recipe(path) for path in (files.recipe, inside) if path.is_file()}


def keep_former(files: RunFiles, candidates: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Candidates of a run, with the recipe that a former run of the request ended with.

    Its decision is that of one of them. Its figures and hashes may be others: rows of other
    requests have been added to the table since, or another version of mofq decided.

    Args:
        files: Of the request.
        candidates: Name -> recipe.

    Returns:
        The candidates; that of the former run as its file has it.

    Raises:
        MofqError: A former run ended with another decision.
    """
    kept = dict(candidates)
    for path, recipe in former_recipes(files).items():
        name = next((name for name, one in kept.items() if _decides_as(one, recipe)), None)
        if name is None:
            raise _other_result(files, path)
        kept[name] = recipe
    return kept


def check_ends_as_before(files: RunFiles, recipe: Recipe) -> None:
    """Refuse to end a run with another recipe than a former run of the request.

    Raises:
        MofqError: As said.
    """
    for path, former in former_recipes(files).items():
        if not _decides_as(recipe, former):
            raise _other_result(files, path)


def _other_result(files: RunFiles, path: Path) -> MofqError:
    """The error where a run would end with another recipe than is there."""
    return MofqError(
        f"{path}: is another recipe than this run would end with: the table has other rows now, or "
        f"it validates on another text. Run with another {option('output')}, or move "
        f"{files.recipe.name}, {files.validation.name} and {files.model.name} away."
    )


def _decides_as(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes of a model do the same to it."""
    return (one.groups, one.unquantized, one.kv_cache, one.rewriting) == (
        other.groups,
        other.unquantized,
        other.kv_cache,
        other.rewriting,
    )


def write_results(
    files: RunFiles, recipe: Recipe, validations: Mapping[str, Validation], *, chosen: str
) -> None:
    """Write what a run ends with: the validations, then the recipe that shows the run complete.

    Args:
        files: Of the request.
        recipe: That the run ends with.
        validations: Of it, and of the alternatives.
        chosen: Its key in ``validations``.
    """
    from mofq.decision.recipe import write_recipe
    from mofq.delivery.validation import write_validation

    named = {
        files.recipe.name if name == chosen else _MIXTURE if name == SEARCHED else name: one
        for name, one in validations.items()
    }
    named = {
        name: replace(one, lineage=replace(one.lineage, candidate=name))
        for name, one in named.items()
    }
    validation = named.pop(files.recipe.name)
    write_validation(validation, files.validation, alternatives=named)
    write_recipe(recipe, files.recipe)


def lack_of_space(needed: int, folder: Path) -> str | None:
    """How much is needed, and how much is free in a folder where that is too little; else None."""
    free = disk_usage(folder).free
    if needed <= _SHARE_OF_DISK * free:
        return None
    return f"{short_bytes(needed)}, and {short_bytes(free)} are free in {folder}"


def finished_runs(folder: Path) -> list[RunFiles]:
    """The requests whose results a folder has, the first one first."""
    stem, ending = Path(_RECIPE).stem, Path(_RECIPE).suffix
    found = [
        RunFiles(folder, path.stem.removeprefix(stem)) for path in folder.glob(f"{stem}*{ending}")
    ]
    return sorted((one for one in found if one.validation.is_file()), key=lambda one: one.suffix)
