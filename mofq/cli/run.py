"""``mofq run`` and ``mofq demo``: the whole flow into one folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any

from mofq.cli.calibrate import load_named, run_calibrate
from mofq.cli.measure import run_measure
from mofq.cli.search import SearchOptions, search_table
from mofq.cli.terminal import note, print_json, print_table, progress_bars, with_error
from mofq.exceptions import MofqError

if TYPE_CHECKING:
    from mofq.recipe import Recipe
    from mofq.validate import Validation

#: Uniform schemes that the recipe is compared with on the real model.
_MOST_UNIFORM = 4


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What `mofq run` was asked for."""

    model: str
    space: str
    output: Path
    max_bits: float | None = None
    max_size: str | None = None
    corpora: tuple[str, ...] = ()
    text: str = "demo-en"
    engine: str | None = None
    tokens: int = 8192
    sequence_length: int = 512
    sequences: int = 8
    device: str = "cpu"


def run_flow(options: RunOptions, *, as_json: bool = False) -> None:
    """Calibrate, measure, search, validate; export where an engine is named."""
    options.output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    table, recipe_path = options.output / "table.jsonl", options.output / "recipe.yaml"
    stats = options.output / "stats"
    corpora = options.corpora or ("demo-en-calibration",)
    length = _sequence_length(options)

    start = monotonic()
    run_calibrate(
        options.model,
        corpora=corpora,
        output=stats,
        sequences=options.sequences,
        sequence_length=length,
        device=options.device,
    )
    seconds["calibrate"], start = monotonic() - start, monotonic()
    run_measure(
        options.model,
        space=options.space,
        output=table,
        stats=stats,
        engine=options.engine,
        device=options.device,
    )
    seconds["measure"], start = monotonic() - start, monotonic()
    decision = search_table(
        SearchOptions(
            table=table,
            output=recipe_path,
            engine=options.engine,
            max_bits=options.max_bits,
            max_size=options.max_size,
        )
    )
    seconds["search"], start = monotonic() - start, monotonic()
    candidates = {"recipe": decision.recipe, **_uniform_recipes(table, decision.recipe)}
    validations = _validate(options, candidates, length)
    seconds["validate"] = monotonic() - start
    if options.engine is not None:
        seconds["export"] = _export(options, recipe_path)
    original_bits = _source_bits(table)
    _report(options, candidates, validations, seconds, original_bits, as_json=as_json)


def run_demo(output: Path | None, *, as_json: bool) -> None:
    """Run the flow on the bundled model: 4 to 8 bits, English and Portuguese."""
    from mofq.demo import demo_model_folder

    options = RunOptions(
        model=str(demo_model_folder()),
        space="w4w8_mixed",
        output=output or Path(),
        max_bits=5.0,
        corpora=("en=demo-en-calibration", "pt=demo-pt-calibration"),
        text="demo-en",
        sequence_length=256,
    )
    if output is not None:
        run_flow(options, as_json=as_json)
        return
    with TemporaryDirectory(prefix="mofq-demo-") as folder:
        run_flow(replace(options, output=Path(folder)), as_json=as_json)
    note("Nothing was kept; `mofq demo -o FOLDER` keeps table, recipe and validations.")


def _sequence_length(options: RunOptions) -> int:
    """The wanted length, or the model's own limit where that is shorter."""
    from mofq.checkpoint.headers import open_checkpoint

    config = open_checkpoint(options.model).config
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    return min(options.sequence_length, int(limit)) if limit else options.sequence_length


def _source_bits(table_path: Path) -> float:
    from mofq.cost import bits_per_weight
    from mofq.table import read_table

    header = read_table(table_path).header
    return bits_per_weight(header.source_bytes_of_groups, header.weights)


def _uniform_recipes(table_path: Path, recipe: Recipe) -> dict[str, Recipe]:
    """Uniform schemes of about the recipe's size, largest first among those not above it."""
    from mofq.decide import uniform_recipes
    from mofq.table import read_table

    every = uniform_recipes(read_table(table_path))
    bits = recipe.bits_per_weight or 0.0
    smaller = [n for n, one in every.items() if (one.bits_per_weight or 0.0) <= 1.02 * bits]
    ranked = sorted(smaller or every, key=lambda n: every[n].kl_nats_per_token or 0.0)
    return {name: every[name] for name in ranked[:_MOST_UNIFORM]}


def _validate(
    options: RunOptions, candidates: dict[str, Recipe], length: int
) -> dict[str, Validation]:
    from mofq.validate import validate_many, write_validation

    with progress_bars() as bars:
        done = validate_many(
            options.model,
            list(candidates.values()),
            load_named(options.text),
            tokens=options.tokens,
            sequence_length=length,
            device=options.device,
            progress=bars.stage,
        )
    validations = dict(zip(candidates, done, strict=True))
    write_validation(validations["recipe"], options.output / "validation.json")
    if not validations["recipe"].enforced:
        raise MofqError(
            f"{options.output / 'recipe.yaml'}: not enforced: "
            f"{validations['recipe'].deviations[0]}. This is a fault of mofq; please report it."
        )
    return validations


def _export(options: RunOptions, recipe: Path) -> float:
    from mofq.cli.export import run_export
    from mofq.engines import find_engine

    start = monotonic()
    assert options.engine is not None
    reads = find_engine(options.engine).reads
    folder = options.output / "model"
    run_export(options.model, recipe, to=reads, output=folder, as_json=False)
    if options.engine.startswith("vllm"):
        note(f"Serve it with: vllm serve {folder}")
    return monotonic() - start


def _report(
    options: RunOptions,
    candidates: dict[str, Recipe],
    validations: dict[str, Validation],
    seconds: dict[str, float],
    original_bits: float,
    *,
    as_json: bool,
) -> None:
    if as_json:
        content: dict[str, Any] = {
            "folder": str(options.output),
            "seconds": {stage: round(time, 2) for stage, time in seconds.items()},
            "validations": {name: one.to_json() for name, one in validations.items()},
        }
        print_json(content)
        return
    original = validations["recipe"].perplexity_original
    rows = [["original", f"{original_bits:.4f}", "", "", f"{original:.4g}", ""]]
    for name, one in sorted(validations.items(), key=lambda item: item[1].kl_nats_per_token):
        rows.append(
            [
                name,
                f"{one.bits_per_weight:.4f}",
                with_error(one.predicted_kl_nats_per_token, one.predicted_kl_stderr),
                with_error(one.kl_nats_per_token, one.kl_stderr),
                f"{one.perplexity:.4g}",
                f"{100 * one.top1_agreement:.2f} %",
            ]
        )
    columns = ["", "bits/weight", "KL predicted", "KL measured", "perplexity", "top-1"]
    title = f"{options.space}: {validations['recipe'].tokens} tokens of {options.text}"
    print_table(f"{title}, KL in nats per token", columns, rows)
    schemes: dict[str, int] = {}
    for group in candidates["recipe"].groups:
        schemes[group.scheme] = schemes.get(group.scheme, 0) + 1
    ranked = sorted(schemes.items(), key=lambda item: -item[1])
    note("recipe: " + ", ".join(f"{count} × {name}" for name, count in ranked))
    note("seconds: " + ", ".join(f"{stage} {time:.1f}" for stage, time in seconds.items()))
