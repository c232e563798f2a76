"""Which scales move before a recipe's schemes are applied: the best of all methods, site by site.

Scales help inputs that are rounded most, so sites are looked at under the schemes of the recipe
that round inputs, and under INT8 per token where it is offered: after scales have moved it may be
the better one. Weight-only schemes are looked at on demand; what AWQ gains there is mostly what
fitted codes gain too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from mofq.delivery.rewriting.choose_scales import Choice, choose_best
from mofq.delivery.rewriting.sites import find_sites
from mofq.evidence.calibration.stats import Stats
from mofq.files.progress import Progress, told
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import ModelLayers
from mofq.numbers.schemes import Scheme, parse_scheme

#: That smoothed inputs are made for.
_SMOOTHED = "int8.channel+int8.token"
_FOR_INPUTS: tuple[str, ...] = ("smoothquant", "bismooth")
_FOR_WEIGHTS: tuple[str, ...] = ("awq",)
_FITTED = re.compile(r"@nats|~[a-z]+")


def rounds_inputs(schemes: Mapping[str, str], layers: ModelLayers) -> bool:
    """Whether most weights meet rounded inputs, so that moving scales pays.

    Of a few fusion groups alone it does not: what fitted codes lose at the others is more.

    Args:
        schemes: Fusion group -> scheme.
        layers: Of the model.
    """
    rounded = total = 0
    for group in layers.groups:
        weights = sum(layer.weights for layer in group.layers)
        total += weights
        if parse_scheme(schemes.get(group.name, "bf16")).activation is not None:
            rounded += weights
    return 2 * rounded >= total > 0


def choose_for_recipe(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    *,
    stats: Stats,
    schemes: Mapping[str, str],
    offered: Mapping[str, Sequence[str]],
    fitted: Collection[str] = (),
    for_weights: bool = False,
    progress: Progress | None = None,
) -> tuple[Choice, ...]:
    """The best proposal of every method for each site, under schemes like a recipe's.

    Args:
        checkpoint: The model.
        layers: Of it.
        stats: Of it.
        schemes: Fusion group -> the recipe's scheme.
        offered: Fusion group -> names of schemes that it may have instead, at no more bits.
        fitted: Names of those of them whose codes will be fitted once scales have moved, beside
            those that say so themselves.
        for_weights: Whether sites of weight-only schemes are looked at.
        progress: Called with ``"rewrite"``, sites done, and all of them.

    Returns:
        A choice for each site that was looked at.

    Raises:
        RewriteError: Nothing is known of the family, or it has no site.
        MofqError: As `choose_scales`.
    """
    on_inputs = {name for name in schemes.values() if parse_scheme(name).activation is not None}
    on_inputs |= {_SMOOTHED} if on_inputs else set()
    choices = []
    sites = find_sites(checkpoint, layers)
    for site in told(sites, progress, "rewrite", total=len(sites)):
        names = [one for one in offered[site.group] if one in on_inputs]
        methods = _FOR_INPUTS
        if not names and for_weights:
            names, methods = [schemes[site.group]], _FOR_WEIGHTS
        targets = {one: _rounded(parse_scheme(one)) for one in names}
        targets = {one: scheme for one, scheme in targets.items() if not scheme.is_unquantized}
        if not targets:
            continue
        choices.append(
            choose_best(
                checkpoint,
                site,
                tuple(dict.fromkeys(targets.values())),
                stats=stats,
                methods=methods,
                fitted={
                    scheme.name
                    for one, scheme in targets.items()
                    if one in fitted or _passes_errors_on(parse_scheme(one))
                },
            )
        )
    return tuple(choices)


def _passes_errors_on(scheme: Scheme) -> bool:
    """Whether columns take over the errors of those before; under ``@nats`` alone they do not."""
    return scheme.weight is not None and scheme.weight.rounds_by_hessian


def _rounded(scheme: Scheme) -> Scheme:
    """A scheme without its fit, which is made after scales have moved."""
    return parse_scheme(_FITTED.sub("", scheme.name)) if scheme.is_fitted else scheme
