"""``mofq run`` and ``mofq demo``: the whole flow into one folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING

from mofq.cli.calibrate import CalibrateOptions, load_named, run_calibrate
from mofq.cli.measure import Where, run_measure
from mofq.cli.run_checks import check_exported, check_run
from mofq.cli.run_report import Report, print_report, report_json
from mofq.cli.search import search_table
from mofq.cli.search_options import SearchOptions
from mofq.cli.terminal import note, print_json, progress_bars, with_error
from mofq.exceptions import MofqError
from mofq.files.locks import hold_folder

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.export.compressed_tensors import Export
    from mofq.delivery.validation import Validation
    from mofq.evidence.spaces import SearchSpace

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
    max_kl: float | None = None
    corpora: tuple[str, ...] = ()
    text: str = "demo-en"
    engine: str | None = None
    tokens: int = 8192
    sequence_length: int = 512
    sequences: int | None = None
    device: str = "cpu"

    @property
    def stats(self) -> Path:
        """Where the calibration goes."""
        return self.output / "stats"

    @property
    def table(self) -> Path:
        """Where the measurements go."""
        return self.output / "table.jsonl"

    @property
    def recipe(self) -> Path:
        """Where the decision goes."""
        return self.output / "recipe.yaml"

    @property
    def exported(self) -> Path:
        """Where the checkpoint for an engine goes."""
        return self.output / "model"


def default_output(model: str) -> Path:
    """The folder of a run that names none: ``Qwen3-0.6B-mofq``, in the current folder."""
    return Path(f"{Path(model).resolve().name}-mofq")


def run_flow(options: RunOptions, *, as_json: bool = False) -> None:
    """Calibrate, measure, search, validate; export where an engine is named."""
    bundled = not options.corpora
    space, options = check_run(options)
    options.output.mkdir(parents=True, exist_ok=True)
    busy = MofqError(
        f"{options.output}: another process runs into this folder. Wait for it, or name another."
    )
    with hold_folder(options.output, busy):
        if bundled:
            _note_bundled(options)
        report = _run_stages(options, space)
    if as_json:
        print_json(report_json(report))
    else:
        print_report(report)


def _note_bundled(options: RunOptions) -> None:
    note(
        f"No --corpus: calibrating on {options.corpora[0]}, a little English text on "
        f"administering Debian. Errors differ between texts: give text like what the model "
        f"will see, --corpus NAME=FILE, and other text of the kind to validate on, --text FILE."
    )


def _run_stages(options: RunOptions, space: SearchSpace) -> Report:
    seconds: dict[str, float] = {}
    with _timed(seconds, "calibrate"):
        _calibrate(options, kv_cache=bool(space.kv_cache))
    with _timed(seconds, "measure"):
        run_measure(
            options.model,
            space=options.space,
            output=options.table,
            stats=options.stats,
            engine=options.engine,
            where=Where(options.device),
        )
    with _timed(seconds, "search"):
        recipe = _search(options, space)
        candidates = {"recipe": recipe, **_uniform_recipes(options, space, recipe)}
    check_exported(options, candidates)
    with _timed(seconds, "validate"):
        validations = _validate(options, candidates)
    name = _preferred(options, candidates, validations)
    export = None
    if options.engine is not None:
        with _timed(seconds, "export"):
            export = _export(options, candidates[name], validations[name])
    return Report(
        folder=options.output,
        model=options.model,
        title=f"{space.name}, {validations[name].tokens} tokens of {options.text}",
        recipe=candidates[name],
        preferred=name,
        validations=validations,
        original_bits=_source_bits(options.table),
        seconds=seconds,
        export=export,
    )


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
        sequences=16,
    )
    with _one_thread():
        if output is not None:
            run_flow(options, as_json=as_json)
            return
        with TemporaryDirectory(prefix="mofq-demo-") as folder:
            run_flow(replace(options, output=Path(folder)), as_json=as_json)
    note("Nothing was kept; `mofq demo -o FOLDER` keeps table, recipe and validation.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The demo's matrices are small: threads would wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = monotonic()
    yield
    seconds[stage] = monotonic() - start


def _calibrate(options: RunOptions, *, kv_cache: bool) -> None:
    run_calibrate(
        CalibrateOptions(
            model=options.model,
            corpora=options.corpora,
            output=options.stats,
            sequences=options.sequences,
            sequence_length=options.sequence_length,
            device=options.device,
            kv_cache=kv_cache,
        )
    )


def _search(options: RunOptions, space: SearchSpace) -> Recipe:
    decision = search_table(
        SearchOptions(
            table=options.table,
            output=options.recipe,
            space=space.name,
            engine=options.engine,
            max_bits=options.max_bits,
            max_size=options.max_size,
            max_kl=options.max_kl,
        )
    )
    for line in decision.notes:
        note(line)
    return decision.recipe


def _source_bits(table_path: Path) -> float:
    from mofq.evidence.table import read_table
    from mofq.model.sizes import bits_per_weight

    header = read_table(table_path).header
    return bits_per_weight(header.source_bytes_of_groups, header.weights)


def _uniform_recipes(options: RunOptions, space: SearchSpace, recipe: Recipe) -> dict[str, Recipe]:
    """The best uniform schemes of about the recipe's size, or the smallest where all are larger."""
    from mofq.decision import Budgets, Request, uniform_recipes
    from mofq.evidence.table import read_table

    request = Request(Budgets(), space=space.name, engine=options.engine)
    every = uniform_recipes(read_table(options.table), request)
    others = {name: one for name, one in every.items() if one.schemes != recipe.schemes}
    most = 1.02 * (recipe.bits_per_weight or 0.0)
    fitting = [name for name, one in others.items() if (one.bits_per_weight or 0.0) <= most]
    fitting.sort(key=lambda name: others[name].kl_nats_per_token or 0.0)
    smallest = sorted(others, key=lambda name: others[name].bits_per_weight or 0.0)[:1]
    return {name: others[name] for name in (fitting or smallest)[:_MOST_UNIFORM]}


def _validate(options: RunOptions, candidates: dict[str, Recipe]) -> dict[str, Validation]:
    from mofq.delivery.validation import validate_many, write_validation

    with progress_bars() as bars:
        done = validate_many(
            options.model,
            list(candidates.values()),
            load_named(options.text),
            tokens=options.tokens,
            sequence_length=options.sequence_length,
            device=options.device,
            stats=options.stats,
            progress=bars.stage,
        )
    validations = dict(zip(candidates, done, strict=True))
    write_validation(validations["recipe"], options.output / "validation.json")
    if not validations["recipe"].enforced:
        raise MofqError(
            f"{options.recipe}: not enforced: {validations['recipe'].deviations[0]}. "
            f"This is a fault of mofq; please report it."
        )
    return validations


def _preferred(
    options: RunOptions, candidates: dict[str, Recipe], validations: dict[str, Validation]
) -> str:
    """``"recipe"``, or a uniform scheme that is no larger and measured no worse.

    A mixture that does not pay is not worth its complexity; what is preferred becomes
    ``recipe.yaml``.
    """
    from mofq.decision.recipe import write_recipe
    from mofq.delivery.validation import write_validation

    searched = validations["recipe"]
    for name, one in validations.items():
        is_smaller = one.bits_per_weight <= searched.bits_per_weight
        is_better = one.kl_nats_per_token <= searched.kl_nats_per_token
        if name != "recipe" and is_smaller and is_better:
            write_recipe(candidates[name], options.recipe)
            write_validation(one, options.output / "validation.json")
            note(
                f"{name} for every layer is as small as the mixture and measured as good: "
                f"{options.recipe} is this uniform recipe."
            )
            return name
    return "recipe"


def _export(options: RunOptions, recipe: Recipe, validation: Validation) -> Export | Path:
    from mofq.cli.export import export_recipe, read_export, write_recipe_file
    from mofq.delivery.backends import RECIPE_EXPORTERS
    from mofq.engines import find_engine

    assert options.engine is not None
    folder, reads = options.exported, find_engine(options.engine).reads
    if reads in RECIPE_EXPORTERS:
        return write_recipe_file(options.model, recipe, to=reads, folder=options.output)
    if folder.exists() and any(folder.iterdir()):
        return read_export(
            options.model, recipe, folder=folder, engine=options.engine, stats=options.stats
        )
    return export_recipe(
        options.model,
        recipe,
        to=reads,
        output=folder,
        engine=options.engine,
        stats=options.stats,
        validation=_card_text(validation),
    )


def _card_text(validation: Validation) -> str:
    """What the model card says of accuracy."""
    kl = with_error(validation.kl_nats_per_token, validation.kl_stderr)
    return (
        f"On {validation.tokens} tokens of `{Path(validation.lineage.text).name}`: KL divergence "
        f"from the original {kl} nats per token, perplexity {validation.perplexity:.4g} "
        f"(original {validation.perplexity_original:.4g}), the same most probable token at "
        f"{100 * validation.top1_agreement:.2f} % of positions."
    )
