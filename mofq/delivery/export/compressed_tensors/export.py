"""Writes a checkpoint folder that serving engines load."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from mofq import __version__
from mofq.decision.make_recipe import sizes_by_shape
from mofq.decision.recipe import RECIPE_FILE, Recipe, recipe_text, write_recipe
from mofq.delivery.export.compressed_tensors.check_folder import check_compressed_tensors
from mofq.delivery.export.compressed_tensors.model_card import model_card
from mofq.delivery.export.compressed_tensors.plan import (
    ExportPlan,
    encoded_parts,
    plan_export,
    split_rows,
)
from mofq.delivery.export.compressed_tensors.quantization_config import quantization_config
from mofq.delivery.recipe_fits import open_fits
from mofq.engines import (
    cache_legality,
    check_devices,
    find_engine,
    legality,
    model_problem,
    serving_environment,
)
from mofq.evidence.fits import Fits
from mofq.exceptions import BackendError, option
from mofq.files.locks import NOTES, check_new_folder, new_folder
from mofq.files.progress import Progress, told
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint
from mofq.model.checkpoint.tensors import keep_freed_memory
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.checkpoint.writer import ShardWriter, copy_other_files, find_other_files
from mofq.numbers.numerics import NUMERICS


@dataclass(frozen=True, slots=True)
class Export:
    """What was written."""

    folder: Path
    group_bytes: int  #: of the fusion groups' tensors, without noted shapes
    checkpoint_bytes: int  #: of all tensors
    serve_command: str | None  #: None: the engine is no server
    load_code: str | None  #: one line of Python, where nothing serves it


def export_compressed_tensors(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out_folder: str | Path,
    *,
    engine: str | None = None,
    stats: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
    validation: str = "",
    progress: Progress | None = None,
) -> Export:
    """Write a recipe's checkpoint in the compressed-tensors format.

    The folder appears under its name when it is complete; what a process that was killed had
    written of the same export is not written again. Codes and scales are
    those of ``quantize_weight``, tuned norms those of the recipe; every other tensor is copied
    byte for byte, except that FP8 weights of the source which stay unquantized are written in
    bf16.

    Args:
        checkpoint: The original model.
        recipe: Of that model.
        out_folder: A folder that does not exist yet, or is empty.
        engine: Refuse what this engine cannot serve as it was measured.
        stats: The folder that the recipe rests on; needed where a scheme is fitted to it.
        shard_bytes: Largest amount of data in one file [bytes].
        validation: What is known of the recipe's accuracy, for the model card, Markdown.
        progress: Called with ``"export"``, fusion groups done, and all of them.

    Returns:
        Folder, sizes, and the command that serves it, or the code that loads it.

    Raises:
        BackendError: A scheme cannot be expressed or served, or the folder is in
            the way; nothing has been read or written by then.
        CheckpointError: The disk is full, or the model of an unknown family.
        EngineError: No engine has that name.
        RecipeError: The recipe is not for this model.
        SchemeError: A weight is not finite.
        StatsError: A scheme is fitted to statistics, and there are none, or others.
    """
    plan = plan_export(checkpoint, recipe)
    if engine is not None:
        _check_engine(plan, engine)
        check_devices(plan.model_layers, find_engine(engine).devices)
        _check_engine_cache(plan, recipe, engine)
    target = Path(out_folder)
    check_new_folder(target, BackendError)
    done = _export_of(plan, target, engine)
    card = model_card(
        plan,
        recipe,
        target.resolve().name,
        serve_command=done.serve_command,
        load_code=done.load_code,
        validation=validation,
    )
    with (
        open_fits(recipe, stats, index_sha256=checkpoint.index_sha256) as fits,
        new_folder(
            target,
            BackendError,
            last=CONFIG_FILE,
            job=_job(checkpoint, recipe, fits=fits, shard_bytes=shard_bytes),
        ) as folder,
    ):
        _write_weights(plan, folder, shard_bytes, fits=fits, progress=progress)
        copy_other_files(checkpoint.folder, folder)
        config = {**plan.checkpoint.config, "quantization_config": quantization_config(plan)}
        if config["quantization_config"] is None:
            del config["quantization_config"]
        _write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if recipe.is_edited:
            recipe = replace(recipe, result=sizes_by_shape(plan.model_layers, recipe.schemes))
        write_recipe(recipe, folder / RECIPE_FILE)
        _write_text(folder / "README.md", card)
    return done


def read_export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    *,
    engine: str,
    stats: str | Path | None,
) -> Export:
    """What an earlier `export_compressed_tensors` wrote, proved byte for byte.

    Args:
        checkpoint: The original model.
        recipe: Of that model.
        folder: That was written.
        engine: That serves it.
        stats: The folder that the recipe rests on.

    Raises:
        EnforcementError: The folder is not what the recipe makes of the model.
        MofqError: As `export_compressed_tensors`.
    """
    with open_fits(recipe, stats, index_sha256=checkpoint.index_sha256) as fits:
        check_compressed_tensors(checkpoint, recipe, folder, fits=fits)
    return _export_of(plan_export(checkpoint, recipe), folder, engine)


def _export_of(plan: ExportPlan, folder: Path, engine: str | None) -> Export:
    """What is known of an export once it is written."""
    load = "" if engine is None else find_engine(engine).load
    return Export(
        folder,
        plan.group_bytes,
        plan.checkpoint_bytes,
        serve_command(plan, folder, engine=engine),
        f"{load}({str(folder)!r})" if load else None,
    )


def serve_command(plan: ExportPlan, folder: Path, *, engine: str | None = None) -> str | None:
    """The command line under which an engine serves an exported folder as it was measured.

    Args:
        plan: Of the export.
        folder: Where it is.
        engine: A name of ``mofq.engines``; None for vLLM in general.

    Returns:
        One line for a shell; None for an engine that is no server.
    """
    start = "vllm serve"
    settings: tuple[str, ...] = ()
    devices: list[str] = []
    if engine is not None:
        served = find_engine(engine)
        choices = [(planned.scheme, planned.group) for planned in plan.quantized]
        if not served.serve:
            return None
        start, settings = served.serve, serving_environment(engine, choices)
        if served.devices > 1:
            devices = [f"{served.devices_flag} {served.devices}"]
    variables = [setting for setting in settings if not setting.startswith("-")]
    flags = [setting for setting in settings if setting.startswith("-")] + list(plan.cache.flags)
    # Packed weights' scales are bf16 and are loaded in the model's dtype.
    if any(planned.storage.format == "pack-quantized" for planned in plan.quantized):
        flags.insert(0, "--dtype bfloat16")
    return " ".join([*variables, start, shlex.quote(str(folder)), *flags, *devices])


def _check_engine(plan: ExportPlan, engine: str) -> None:
    reads = find_engine(engine).reads
    if reads != "compressed-tensors":
        raise BackendError(
            f"{engine} reads {reads}, not compressed-tensors. Export for it with "
            f"{option('to', reads)}."
        )
    layers = plan.model_layers
    if problem := model_problem(find_engine(engine), layers.architecture, layers.groups):
        raise BackendError(f"{problem}. Search again with another {option('engine')}.")
    check = legality(engine, layers.architecture)
    for planned in plan.quantized:
        if reason := check(planned.scheme, planned.group):
            raise BackendError(
                f"{planned.group.name} in {planned.scheme.name}: {reason}. "
                f"Search again with {option('engine', engine)}."
            )


def _check_engine_cache(plan: ExportPlan, recipe: Recipe, engine: str) -> None:
    check = cache_legality(engine)
    caches = {cache.name: cache for cache in plan.model_layers.caches}
    for one in recipe.kv_cache:
        if reason := check(one.scheme, caches[one.name]):
            raise BackendError(
                f"{one.name} in {one.scheme}: {reason}. Search again with "
                f"{option('engine', engine)}."
            )


def _job(checkpoint: Checkpoint, recipe: Recipe, *, fits: Fits | None, shard_bytes: int) -> str:
    """All that decides the bytes of the weights, and which files there are."""
    content = {
        "mofq": __version__,
        "numerics": NUMERICS,
        "to": "compressed-tensors",
        "index_sha256": checkpoint.index_sha256,
        "weights_sha256": hash_weights(checkpoint),
        "recipe_sha256": sha256(recipe_text(recipe).encode()).hexdigest(),
        "stats_sha256": None if fits is None else fits.stats.sha256,
        "shard_bytes": shard_bytes,
        "files": sorted(find_other_files(checkpoint.folder)),
    }
    return json.dumps(content, indent=1) + "\n"


def _write_weights(
    plan: ExportPlan,
    folder: Path,
    shard_bytes: int,
    *,
    fits: Fits | None,
    progress: Progress | None,
) -> None:
    keep_freed_memory()
    journal = folder / NOTES / "written"
    with ShardWriter(folder, plan.tensors, shard_bytes=shard_bytes, journal=journal) as writer:
        for planned in told(plan.quantized, progress, "export", total=len(plan.quantized)):
            if writer.is_settled(planned.group.name):
                continue  # a run that was killed came as far
            for layer, word, _, rows in encoded_parts(plan.checkpoint, planned, fits=fits):
                writer.add_rows(f"{layer.name}.{word}", rows)
            writer.settle(planned.group.name)
        for name, scale in plan.cache.tensors.items():
            writer.add_rows(name, scale)
        for name, _, rows in split_rows(plan):
            writer.add_rows(name, rows)
        for name, tensor in plan.tuned.items():
            writer.add_rows(name, tensor)
        for info in plan.kept:
            writer.keep(info)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
