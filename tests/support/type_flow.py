"""The whole flow on one tiny checkpoint, as a user types it."""

from __future__ import annotations

from pathlib import Path

from command_line import Ran, mofq

SPACE = """
version: 1
description: for the tests
schemes: [int4.g32, int8.channel, fp8_e4m3.channel+fp8_e4m3.token]
base: [int4.g32]
"""
_CACHES = "kv_cache: ['kv:fp8_e4m3.tensor']\n"
_SHORT = ("--corpus", "a=demo-en-calibration", "--sequences", "4", "--sequence-length", "32")
_TEXT = ("--text", "demo-en", "--tokens", "96", "--sequence-length", "32")


class FlowError(Exception):
    """A command of the flow was refused; the message has the command and its own message."""


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
        The measured KL of the recipe, the same in memory and of the exported folder.

    Raises:
        FlowError: A command was refused.
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
    emulated = _run("validate", model, recipe, *_TEXT, "--json").json
    assert emulated["enforced"] is True
    assert emulated["kl_nats_per_token"] > 0
    _run("export", model, recipe, "--to", "compressed-tensors", "-o", exported)
    reloaded = _run("validate", model, exported, *_TEXT, "--json").json
    assert reloaded["enforced"] is True
    assert reloaded["kl_nats_per_token"] == emulated["kl_nats_per_token"]
    return float(emulated["kl_nats_per_token"])


def _run(*arguments: str | Path) -> Ran:
    ran = mofq(*arguments)
    if ran.code != 0:
        reason = ran.err.strip() or ran.out.strip()
        raise FlowError(f"{arguments[0]}: {reason.removeprefix('Error: ')}")
    return ran
