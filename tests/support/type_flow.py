"""The whole flow on one tiny checkpoint, as a user types it."""

from __future__ import annotations

from pathlib import Path

from command_line import Ran, mofq

from mofq.decision.recipe import load_recipe
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.layers import find_layers
from mofq.model.layers.name_patterns import TOWERS

SPACE = """
version: 1
description: for the tests
schemes: [int4.g32, int8.channel, fp8_e4m3.channel+fp8_e4m3.token]
base: [int4.g32]
"""
_CACHE = "kv:fp8_e4m3.tensor"
_CACHES = f"kv_cache: ['{_CACHE}']\n"
#: Of a processor of images, with which nothing but a copy happens.
_PROCESSOR = {
    "preprocessor_config.json": '{"image_mean": [0.5]}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}
_SHORT = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")
_TEXT = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32")


class FlowError(Exception):
    """A command of the flow was refused; the message has the command and its own message."""


def write_processor(folder: Path) -> None:
    """Add the files of a processor to a checkpoint, which an export must copy."""
    for name, content in _PROCESSOR.items():
        (folder / name).write_text(content)


def run_flow(
    model: Path, work: Path, *, layers: Path | None = None, kv_cache: bool = False
) -> float:
    """Inspect, measure with and without statistics, search, emulate, export and reload.

    Args:
        model: A tiny checkpoint.
        work: An empty folder.
        layers: A file for ``--layers``.
        kv_cache: Decide the format of the KV cache too, which is rounded from then on.

    Returns:
        The measured KL of the recipe, the same in memory and of the exported folder, which has
        towers and the files of a processor as they were.

    Raises:
        FlowError: A command was refused.
        AssertionError: A result is another than it must be.
    """
    space, stats, table, recipe, exported = (
        work / name for name in ("space.yaml", "stats", "table.jsonl", "recipe.yaml", "exported")
    )
    space.write_text(SPACE)
    said = () if layers is None else ("--layers", layers)
    _run("inspect", model, *said)
    _run("measure", model, "--space", space, *said, "-o", work / "plain.jsonl")
    watch = ("--kv-cache",) if kv_cache else ()
    _run("calibrate", model, *_SHORT, *said, *watch, "-o", stats)
    space.write_text(SPACE + _CACHES if kv_cache else SPACE)
    _run("measure", model, "--space", space, "--stats", stats, *said, "-o", table)
    bits = ("--max-kv-bits", "8") if kv_cache else ()
    _run("search", table, "--max-bits", "7", *bits, "-o", recipe)
    if kv_cache:
        _check_caches(model, recipe)
    emulated = _run("validate", model, recipe, *_TEXT, "--json").json
    assert emulated["enforced"] is True
    assert emulated["kl_nats_per_token"] > 0
    _run("export", model, recipe, "--to", "compressed-tensors", "-o", exported)
    reloaded = _run("validate", model, exported, *_TEXT, "--json").json
    assert reloaded["enforced"] is True
    assert reloaded["kl_nats_per_token"] == emulated["kl_nats_per_token"]
    _check_kept(model, exported)
    return float(emulated["kl_nats_per_token"])


def _check_caches(model: Path, recipe: Path) -> None:
    """See that every KV cache has its scheme."""
    caches = find_layers(open_checkpoint(str(model))).caches
    chosen = {one.name: one.scheme for one in load_recipe(recipe).kv_cache}
    assert caches
    assert chosen == {cache.name: _CACHE for cache in caches}


def _check_kept(model: Path, exported: Path) -> None:
    """See that towers and a processor's files were copied."""
    checkpoint, kept = open_checkpoint(str(model)), open_stored(str(exported)).tensors
    for name, info in checkpoint.tensors.items():
        if TOWERS.search(name):
            assert name in kept, name
            assert (kept[name].dtype, kept[name].shape) == (info.dtype, info.shape), name
    for name in _PROCESSOR:
        if (model / name).is_file():
            assert (exported / name).is_file(), name
            if name.endswith("config.json"):
                assert (exported / name).read_bytes() == (model / name).read_bytes(), name


def _run(*arguments: str | Path) -> Ran:
    ran = mofq(*arguments)
    if ran.code != 0:
        reason = ran.err.strip() or ran.out.strip()
        raise FlowError(f"{arguments[0]}: {reason.removeprefix('Error: ')}")
    return ran
