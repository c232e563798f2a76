"""From a checkpoint and its statistics to a rewritten checkpoint."""

from __future__ import annotations

from pathlib import Path

from mofq.delivery.rewriting.choose_scales import Choice, choose_scales
from mofq.delivery.rewriting.sites import find_sites
from mofq.delivery.rewriting.write import write_rewritten
from mofq.evidence.calibration.stats import Stats, check_same_model, verify_sequences
from mofq.evidence.spaces import offer_schemes, parse_search_space
from mofq.exceptions import RewriteError, option
from mofq.files.locks import check_new_folder
from mofq.files.progress import Progress, told
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import FusionGroup, find_layers
from mofq.numbers.schemes import Scheme

#: What a method is for, unless another scheme is named.
TARGETS = {
    "smoothquant": "int8.channel+int8.token",
    "awq": "int4.g[128,64,32]",
    "bismooth": "int8.channel+int8.token",
}


def rewrite(
    checkpoint: Checkpoint,
    stats: Stats,
    out_folder: str | Path,
    *,
    method: str,
    scheme: str | None = None,
    powers_of_two: bool = False,
    progress: Progress | None = None,
) -> tuple[Choice, ...]:
    """Choose a strength for every site by predicted nats, and write the rewritten model.

    Args:
        checkpoint: The model, unquantized.
        stats: Of the model.
        out_folder: A folder that does not exist yet, or is empty.
        method: One of ``METHODS``.
        scheme: That the model will be quantized by; a bracket such as ``int4.g[128,64,32]``
            takes the first size that fits a layer. By default that of ``TARGETS``.
        powers_of_two: Move powers of two alone, which changes no product of the model.
        progress: Called with a stage, what is done of it, and all of it.

    Returns:
        What was chosen at each site.

    Raises:
        RewriteError: The method or family is unknown, or the scheme cannot be a target.
        StatsError: The stats are of another model.
        MofqError: As ``choose_scales`` and ``write_rewritten``.
    """
    _check_inputs(checkpoint, stats, Path(out_folder))
    layers = find_layers(checkpoint)
    sites = find_sites(checkpoint, layers)
    groups = {group.name: group for group in layers.groups}
    targets = [_target(scheme or TARGETS[method], groups[site.group]) for site in sites]
    verify_sequences(stats)
    pairs = zip(sites, targets, strict=True)
    choices = [
        choose_scales(
            checkpoint, site, target, stats=stats, method=method, powers_of_two=powers_of_two
        )
        for site, target in told(pairs, progress, "choose", total=len(sites))
    ]
    write_rewritten(checkpoint, choices, out_folder, method=method, stats=stats, progress=progress)
    return tuple(choices)


def _check_inputs(checkpoint: Checkpoint, stats: Stats, out_folder: Path) -> None:
    """Refuse what would only be found after the long work."""
    check_same_model(stats, checkpoint, weights_sha256=hash_weights(checkpoint))
    check_new_folder(out_folder, RewriteError)


def _target(text: str, group: FusionGroup) -> Scheme:
    """The scheme that a fusion group will have: the first of a bracket that fits, or bf16."""
    space = parse_search_space(
        f"version: 1\nschemes: ['{text}']", name="scheme", where=option("scheme")
    )
    for scheme in space.schemes:
        if scheme.is_fitted:
            raise RewriteError(
                f"{option('scheme', text)}: codes are fitted to a model after it was rewritten. "
                f"Give the scheme without @nats, ~gptq and ~descent here, and let the search "
                f"choose those."
            )
    (offer,) = offer_schemes(space, [group], has_stats=True)
    return offer.schemes[0]
