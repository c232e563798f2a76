"""``mofq rewrite``."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from mofq.cli.checks import check_folder
from mofq.cli.terminal import note, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mofq.delivery.rewriting.choose import Choice


def run_rewrite(
    model: str,
    *,
    stats: Path,
    method: str,
    scheme: str | None,
    powers_of_two: bool,
    output: Path,
    as_json: bool = False,
) -> None:
    """Rewrite a model and say what moved."""
    from mofq.delivery.rewriting.rewrite import rewrite
    from mofq.evidence.calibration.stats import read_stats
    from mofq.model.checkpoint.headers import open_checkpoint

    start = monotonic()
    check_folder(output)
    checkpoint = open_checkpoint(model)
    with progress_bars() as bars:
        choices = rewrite(
            checkpoint,
            read_stats(stats),
            output,
            method=method,
            scheme=scheme,
            powers_of_two=powers_of_two,
            progress=bars.stage,
        )
    content = _summary(choices) | {"folder": str(output), "seconds": round(monotonic() - start, 2)}
    if as_json:
        print_json(content)
        return
    _print_choices(choices, title=f"{method}: KL of each site [nats/token]")
    note(
        f"{output}: {content['moved']} of {len(choices)} sites moved; predicted KL of their layers "
        f"{content['kl_before']:.4g} before, {content['kl_after']:.4g} after; "
        f"{content['seconds']:.1f} s. Calibrate this folder before it is measured."
    )


def _print_choices(choices: Sequence[Choice], *, title: str) -> None:
    rows = [
        [
            one.site.group,
            one.scheme,
            "–" if one.strength is None else _strength(one),
            f"{one.nats_before:.3g}",
            f"{one.nats_after:.3g}",
        ]
        for one in choices
    ]
    print_table(title, ["site", "scheme", "strength", "before", "after"], rows)


def _strength(choice: Choice) -> str:
    assert choice.strength is not None
    return f"{choice.strength.alpha:g}, {choice.strength.beta:.3g}"


def _summary(choices: Sequence[Choice]) -> dict[str, Any]:
    return {
        "sites": {
            one.site.group: {
                "scheme": one.scheme,
                "strength": None
                if one.strength is None
                else {"alpha": one.strength.alpha, "beta": one.strength.beta},
                "kl_before": one.nats_before,
                "kl_after": one.nats_after,
            }
            for one in choices
        },
        "moved": sum(one.strength is not None for one in choices),
        "kl_before": sum(one.nats_before for one in choices),
        "kl_after": sum(one.nats_after for one in choices),
    }
