"""Where to start: space, engine, budget, by published findings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.options import Option, documented

if TYPE_CHECKING:
    from mofq.decision.advice import Advice


@dataclass(frozen=True, slots=True)
class AdviseResult:
    """Where to start, why, and with which commands."""

    advice: Advice
    commands: tuple[str, ...]
    deployment: str
    device: str
    tp: int  #: devices that share the model

    def to_json(self) -> dict[str, Any]:
        """The advice, for machines."""
        return {
            "space": self.advice.space,
            "budget": list(self.advice.budget),
            "engines": list(self.advice.engines),
            "rules": [{"says": one.says, "source": one.source} for one in self.advice.rules],
            "commands": list(self.commands),
        }


@documented
def advise(
    model: Annotated[
        str | Path | None,
        Option("A model folder or hub id, for its size.", positional=True, read_as=str),
    ] = None,
    *,
    device_model: Annotated[str, Option("h100 … of `mofq devices`, or a YAML file.")],
    deployment: Annotated[
        Literal["synchronous", "asynchronous"],
        Option("synchronous: one request at a time, latency; asynchronous: many at once."),
    ],
    recovery: Annotated[float | None, Option("Share of the accuracy to keep, e.g. 0.99.")] = None,
    tp: Annotated[int, Option("Devices that share the model.", least=1)] = 1,
) -> AdviseResult:
    """Where to start: space, engine, budget, by published findings.

    Returns:
        The advice with its sources.

    Raises:
        MofqError: An input is not valid.
    """
    from mofq.decision.advice import Situation
    from mofq.decision.advice import advise as advise_on
    from mofq.engines.devices import load_device_model

    device = load_device_model(device_model)
    weights, other_bytes = (None, 0) if model is None else _sizes(model)
    advice = advise_on(
        Situation(
            deployment, device, weights=weights, other_bytes=other_bytes, recovery=recovery, tp=tp
        )
    )
    commands = _commands(advice, str(model or "MODEL"), tp=tp)
    return AdviseResult(advice, commands, deployment, device.name, tp)


def _sizes(model: str | Path) -> tuple[int, int]:
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers
    from mofq.model.sizes import weights_of

    layers = find_layers(open_checkpoint(str(model)))
    return weights_of(layers.groups), layers.other_bytes


def _commands(advice: Advice, model: str, *, tp: int) -> tuple[str, ...]:
    devices = f":tp={tp}" if tp > 1 else ""
    engine = f" --engine {advice.engines[0]}{devices}" if advice.engines else ""
    calibration_free = advice.space == "llama3_70b_w8a8"
    first = [] if calibration_free else [f"mofq calibrate {model} --corpus en=TEXT -o stats"]
    stats = "" if calibration_free else " --stats stats"
    # Groups of INT8 weights under INT8 activations are what no engine serves: see the space.
    engine = "" if calibration_free else engine
    return (
        *first,
        f"mofq measure {model} --space {advice.space}{engine}{stats} -o table.jsonl",
        f"mofq search table.jsonl{engine} {' '.join(advice.budget)} -o recipe.yaml",
        f"mofq validate {model} recipe.yaml --text OTHER_TEXT",
    )
