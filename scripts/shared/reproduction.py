"""What the reproductions share: recipes from a table, their measured KL.

Every measurement goes to a file of JSON lines as soon as it is known and is not made again
for the same recipe, text and sizes. The original runs once for all recipes that are missing.
Enforcement is not repeated here; `mofq validate` proves it for any recipe that is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.decision.make_recipe import recipe_from_layers, recipe_from_table
from mofq.decision.recipe import Recipe
from mofq.delivery.apply import emulate
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.validation.divergence import OriginalLogits, compare, run_original
from mofq.delivery.validation.report import summarize
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.corpora import Corpus, load_text, tokenize
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.spaces import shape_rejection
from mofq.evidence.table import Row, Table, read_table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model, load_tokenizer
from mofq.model.sizes import bits_per_weight, counted_bytes, weights_of
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import (
    Argument,
    calibrate,
    model_parser,
    mofq,
    parse_into_work,
    print_markdown,
    with_error,
)

SEQUENCE_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Measured:
    """A quantized model against the original on one text."""

    bits_per_weight: float
    kl: float  #: nats per token
    kl_stderr: float | None  #: over windows
    perplexity: float
    perplexity_original: float
    top1_agreement: float
    windows: tuple[float, ...]  #: KL of each

    @property
    def recovery_percent(self) -> float:
        """Of the original's perplexity: 100 where nothing is lost."""
        return 100 * self.perplexity_original / self.perplexity


def arguments(
    documentation: str | None,
    given: Sequence[str] | None,
    *required: Argument,
    optional: Sequence[Argument] = (),
) -> argparse.Namespace:
    """The arguments that all scripts have, and further paths that must be given.

    Args:
        documentation: Of the script.
        given: None for the command line's own.
        required: Options that must be given.
        optional: Options that may be left out.
    """
    parser = model_parser(documentation, *required)
    parser.add_argument("--begun", type=Path, nargs="*", default=(), help="tables with some rows")
    for name, explanation in optional:
        parser.add_argument(name, help=explanation)
    return parse_into_work(parser, given)


def table_of(
    model: str, space: str | Path, *, stats: str | Path, path: Path, begun: Sequence[Path] = ()
) -> Table:
    """Measure a search space, what is there already left alone.

    Args:
        model: Folder.
        space: Name or file.
        stats: From `mofq calibrate`.
        path: Of the table.
        begun: Tables of the same model and stats whose rows it starts with.
    """
    if begun and not path.exists():
        path.write_text(_joined(begun), encoding="utf-8")
    mofq("measure", model, "--space", space, "--stats", stats, "-o", path)
    return read_table(path)


def _joined(paths: Sequence[Path]) -> str:
    """The first table, and of the others the rows that it does not have yet."""
    kept: dict[tuple[object, ...], str] = {}
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            content = json.loads(line)
            kind = content["kind"]
            if kind == "header":
                key: tuple[object, ...] = ("header", str(content["model"]), str(content["stats"]))
            elif kind == "space":
                key = ("space", content["sha256"], content["engine"])
            else:
                key = (
                    kind,
                    *(
                        content.get(part)
                        for part in ("group", "scheme", "unit", "corpus", "module")
                    ),
                )
            kept.setdefault(key, line)
    headers = [key for key in kept if key[0] == "header"]
    assert len(headers) == 1, "tables of different models or stats"
    return "".join(line + "\n" for line in kept.values())


def stats_of(
    model: str | Path, corpora: Mapping[str, str], folder: Path, *, sequences: int = 8
) -> Path:
    """Calibrate, unless that was done; corpus name -> text."""
    named = [f"{name}={text}" for name, text in corpora.items()]
    return calibrate(model, named, folder, "--sequences", sequences)


def rewritten(model: str | Path, stats: str | Path, folder: Path, *method: str) -> Path:
    """Run `mofq rewrite` with a method and its options, unless that was done; the folder."""
    if not folder.exists():
        mofq("rewrite", model, "--stats", stats, "--method", *method, "-o", folder)
    return folder


def calibrated_anew(model: Path, text: str, folder: Path, *, like: str | Path) -> Path:
    """Calibrate a rewritten model as the one that it was made of, unless that was done.

    Args:
        model: The rewritten one.
        text: The one of the calibration that it was rewritten by.
        folder: Of the new calibration, which is returned.
        like: Of that one.
    """
    corpus = read_stats(Path(like)).plan.corpora[0]
    return stats_of(model, {corpus.name: text}, folder, sequences=corpus.sequences)


def rows_by_scheme(table: Table, unit: str, corpus: str | None = None) -> dict[str, dict[str, Row]]:
    """Fusion group -> scheme -> row, in one unit."""
    return {
        group: {row.scheme: row for row in rows}
        for group, rows in table.rows_of(unit, corpus).items()
    }


def recipe(table: Table, schemes: Mapping[str, str]) -> Recipe:
    """A recipe of a table's model; fusion group -> scheme."""
    return recipe_from_table(table, schemes, made_by={"solver": "script"}, budget={})


def uniform(table: Table, *schemes: str) -> Recipe | None:
    """For every fusion group the first of some schemes measured; None: one has none."""
    names = [parse_scheme(name).name for name in schemes]
    measured = {(row.group, row.scheme) for row in table.rows}
    chosen = {}
    for group in table.header.groups:
        known = [name for name in names if (group.name, name) in measured]
        if not known:
            return None
        chosen[group.name] = known[0]
    return recipe(table, chosen)


def uniform_of(model: str, *schemes: str, amax: Mapping[str, float] | None = None) -> Recipe:
    """For every fusion group the first of some schemes that its shape takes, without a table.

    Args:
        model: Folder.
        schemes: In order of preference.
        amax: Layer -> largest input magnitude, where a scheme has static activations.
    """
    checkpoint = open_checkpoint(model)
    layers = find_layers(checkpoint)
    chosen = {
        group.name: next(
            found.name
            for found in map(parse_scheme, schemes)
            if all(shape_rejection(found, layer) is None for layer in group.layers)
        )
        for group in layers.groups
    }
    return recipe_from_layers(layers, chosen, checkpoint=checkpoint, static_amax=amax)


def print_measured(done: Mapping[str, Measured]) -> None:
    """One row for each recipe."""
    rows = [
        [
            label,
            f"{one.bits_per_weight:.3f}",
            with_error(one.kl, one.kl_stderr),
            f"{one.perplexity:.2f}",
            f"{one.recovery_percent:.2f}",
            f"{100 * one.top1_agreement:.1f} %",
        ]
        for label, one in done.items()
    ]
    columns = ["", "bits/weight", "KL [nats/token]", "perplexity", "recovery [%]", "top-1"]
    print_markdown(columns, rows)
    original = next(iter(done.values())).perplexity_original
    print(f"Perplexity of the original: {original:.2f}.\n")


def predicted(table: Table, of: Recipe, *, corpus: str | None = None) -> float:
    """The sum of a recipe's rows in nats per token."""
    corpus = corpus or next(c for unit, c in table.measures if unit == "kl_nats_per_token")
    rows = rows_by_scheme(table, "kl_nats_per_token", corpus)
    return sum(rows[group.name][group.scheme].error for group in of.groups)


def input_amax(model: str, stats: str | Path, *, saturated: float = 0.0) -> dict[str, float]:
    """Static scales of every layer from its calibration inputs.

    Args:
        model: Folder.
        stats: From `mofq calibrate`.
        saturated: Share of the inputs that may saturate. Where it is not 0, the largest
            magnitude is halved for as long as no larger share exceeds it.

    Returns:
        Layer -> the magnitude that the largest code stands for.
    """
    found = read_stats(Path(stats))
    layers = [layer.name for layer in find_layers(open_checkpoint(model)).grouped_layers]
    amax = {}
    with SampleReader(found) as reader:
        for layer in layers:
            samples = [reader.read(corpus.name, layer) for corpus in found.plan.corpora]
            inputs = [one.x_MCI.abs() for one in samples if one is not None]
            limit = float(max(x.max() for x in inputs))
            count = sum(one.is_token_MC.sum().item() * one.x_MCI.shape[2] for one in samples if one)
            while saturated and limit > 0:
                if sum(int((x > limit / 2).sum()) for x in inputs) > saturated * count:
                    break
                limit /= 2
            amax[layer] = limit
    return amax


@dataclass(frozen=True, slots=True)
class Reference:
    """A model and a text that versions of the model are compared with it on."""

    model: str  #: folder
    text: Corpus | str  #: that nothing was calibrated on
    cache: Path  #: JSON lines of what was measured; read, and appended to
    tokens: int  #: of the text


def reference_of(
    options: argparse.Namespace,
    *,
    model: str | Path | None = None,
    text: Corpus | None = None,
) -> Reference:
    """The model and the text that a script was given, or others."""
    cache = options.work / "measured.jsonl"
    return Reference(str(model or options.model), text or options.text, cache, options.tokens)


@dataclass(frozen=True, slots=True)
class Version:
    """A way to change a model."""

    identity: str  #: everything that its numbers depend on
    bits_per_weight: float
    apply: Callable[[PreTrainedModel], PreTrainedModel]  #: in place


def measure_recipes(
    reference: Reference, recipes: Mapping[str, Recipe], *, stats: str | Path | None = None
) -> dict[str, Measured]:
    """What each recipe does to a text; see `measure_versions`.

    Schemes that are fitted to statistics, such as those of GPTQ, need their folder.
    """
    checkpoint = open_checkpoint(reference.model)
    fitted_to = None if stats is None else read_stats(Path(stats)).sha256
    versions = {
        label: Version(
            recipe_identity(one, fitted_to),
            true_bits(checkpoint, one),
            partial(_apply, recipe=one, checkpoint=checkpoint, stats=stats),
        )
        for label, one in recipes.items()
    }
    return measure_versions(reference, versions)


def _apply(
    model: PreTrainedModel, recipe: Recipe, checkpoint: Checkpoint, stats: str | Path | None
) -> PreTrainedModel:
    with open_fits(recipe, stats, index_sha256=checkpoint.index_sha256) as fits:
        return emulate.apply(model, recipe, checkpoint=checkpoint, fits=fits)


def version_of_rewritten(folder: str, recipe: Recipe, stats: str | Path) -> Version:
    """A recipe for a rewritten model, to be compared with the model that it was made of."""
    checkpoint = open_checkpoint(folder)

    def apply(_: PreTrainedModel) -> PreTrainedModel:
        return _apply(load_original(checkpoint), recipe, checkpoint, stats)

    identity = recipe_identity(recipe, read_stats(Path(stats)).sha256)
    return Version(f"{folder} {identity}", true_bits(checkpoint, recipe), apply)


def recipe_identity(of: Recipe, fitted_to: str | None) -> str:
    """Everything that a recipe's numbers depend on, besides model and text."""
    schemes = sorted(of.schemes.items())
    content: list[object] = [schemes, sorted(of.static_amax.items())]
    weights = [parse_scheme(name).weight for _, name in schemes]
    if any(weight is not None and weight.is_fitted for weight in weights):
        content.append(fitted_to)
    return json.dumps(content)


def measure_versions(reference: Reference, versions: Mapping[str, Version]) -> dict[str, Measured]:
    """What each version of a model does to a text, by its label."""
    text, tokens, cache = reference.text, reference.tokens, reference.cache
    corpus = load_text(text) if isinstance(text, str) else text
    checkpoint = open_checkpoint(reference.model)
    known = {} if not cache.exists() else dict(map(_entry, cache.read_text("utf-8").splitlines()))
    keys = {label: _key(one, corpus, tokens, checkpoint) for label, one in versions.items()}
    missing = {keys[label]: label for label in versions if keys[label] not in known}
    if missing:
        with OriginalLogits() as logits:
            windows_NT = windows_of(checkpoint, corpus, tokens=tokens)
            entropies = run_original(load_original(checkpoint), windows_NT, into=logits)
            for key, label in missing.items():
                changed = versions[label].apply(load_original(checkpoint))
                scores = compare(changed, windows_NT, original=logits)
                found = summarize(scores, entropies, sequence_length=SEQUENCE_LENGTH)
                known[key] = Measured(
                    bits_per_weight=versions[label].bits_per_weight,
                    kl=found.kl_nats_per_token,
                    kl_stderr=found.kl_stderr,
                    perplexity=found.perplexity,
                    perplexity_original=found.perplexity_original,
                    top1_agreement=found.top1_agreement,
                    windows=found.windows,
                )
                with cache.open("a", encoding="utf-8") as file:
                    print(json.dumps({"key": key, "label": label, **asdict(known[key])}), file=file)
                print(f"{label}: {known[key].kl:.5f} nats/token", file=sys.stderr, flush=True)
    return {label: known[key] for label, key in keys.items()}


def windows_of(checkpoint: Checkpoint, text: Corpus, *, tokens: int) -> Tensor:
    """The first tokens of a text in windows, [windows, `SEQUENCE_LENGTH`]."""
    tokenizer = load_tokenizer(checkpoint.folder)
    return tokenize(text, tokenizer, tokens=tokens, sequence_length=SEQUENCE_LENGTH)


def load_original(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model as it is, in float32 on the CPU."""
    return load_model(checkpoint.folder, dtype="float32", device="cpu")


def run_over(model: PreTrainedModel, windows_NT: Tensor) -> None:
    """Run a model whose hooks look at what passes."""
    with torch.inference_mode():
        for window_T in windows_NT:
            model(window_T[None])


def true_bits(checkpoint: Checkpoint, of: Recipe) -> float:
    """Bits per weight: codes, scales, zero points and padding."""
    groups = find_layers(checkpoint).groups
    size = sum(
        counted_bytes(group, parse_scheme(of.schemes[group.layers[0].name])) for group in groups
    )
    return bits_per_weight(size, weights_of(groups))


def _key(of: Version, corpus: Corpus, tokens: int, checkpoint: Checkpoint) -> str:
    folder = str(checkpoint.folder.resolve())
    content = [checkpoint.index_sha256, folder, corpus.sha256, tokens, of.identity]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _entry(line: str) -> tuple[str, Measured]:
    content = json.loads(line)
    key = content.pop("key")
    del content["label"]
    return key, Measured(**{**content, "windows": tuple(content["windows"])})
