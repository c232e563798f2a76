"""``mofq advise`` and ``mofq devices``."""

from __future__ import annotations

from dataclasses import asdict

from mofq.cli.terminal import note, print_json, print_table, say, short_bytes
from mofq.decision.advice import Advice, Situation, advise
from mofq.engines.devices import DEVICE_MODELS, load_device_model


def run_devices(*, as_json: bool) -> None:
    """The device models that come with mofq, and where their figures are from."""
    if as_json:
        print_json({name: asdict(device) for name, device in DEVICE_MODELS.items()})
        return
    rows = []
    for name, one in DEVICE_MODELS.items():
        peaks = {key: f"{1e-12 * peak:g}" for key, peak in one.operations_per_second.items()}
        rates = [peaks.get(key, "–") for key in ("bf16", "int8", "fp8", "fp4")]
        rows.append(
            [name, short_bytes(one.memory_bytes), f"{one.bytes_per_second / 1e12:g}", *rates]
        )
    columns = ["device", "memory", "TB/s", "bf16 TFLOPS", "int8 TOPS", "fp8", "fp4"]
    print_table("device models: dense peaks, so times are lower bounds", columns, rows)
    for name, one in DEVICE_MODELS.items():
        note(f"{name}: {one.source}")


def run_advise(
    model: str | None,
    *,
    device_model: str,
    deployment: str,
    recovery: float | None,
    tp: int,
    as_json: bool,
) -> None:
    """Say where to start, why, and with which commands."""
    device = load_device_model(device_model)
    weights, other_bytes = (None, 0) if model is None else _sizes(model)
    situation = Situation(
        deployment, device, weights=weights, other_bytes=other_bytes, recovery=recovery, tp=tp
    )
    advice = advise(situation)
    commands = _commands(advice, model or "MODEL", tp=tp)
    if as_json:
        print_json(
            {
                "space": advice.space,
                "budget": list(advice.budget),
                "engines": list(advice.engines),
                "rules": [{"says": one.says, "source": one.source} for one in advice.rules],
                "commands": commands,
            }
        )
        return
    engines = ", ".join(advice.engines) or "none that mofq has rules for"
    rows = [
        ["search space", advice.space],
        ["budget", " ".join(advice.budget)],
        ["engines", engines],
    ]
    print_table(f"{deployment} serving on {tp} × {device.name}", ["", ""], rows)
    for number, one in enumerate(advice.rules, start=1):
        say(f"{number}. {one.says} [{one.source}]")
    say("Start with:")
    for command in commands:
        say(f"  {command}")


def _sizes(model: str) -> tuple[int, int]:
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers
    from mofq.model.sizes import weights_of

    layers = find_layers(open_checkpoint(model))
    return weights_of(layers.groups), layers.other_bytes


def _commands(advice: Advice, model: str, *, tp: int) -> list[str]:
    devices = f":tp={tp}" if tp > 1 else ""
    engine = f" --engine {advice.engines[0]}{devices}" if advice.engines else ""
    calibration_free = advice.space == "llama3_70b_w8a8"
    first = [] if calibration_free else [f"mofq calibrate {model} --corpus en=TEXT -o stats"]
    stats = "" if calibration_free else " --stats stats"
    # Groups of INT8 weights under INT8 activations are what no engine serves: see the space.
    engine = "" if calibration_free else engine
    return [
        *first,
        f"mofq measure {model} --space {advice.space}{engine}{stats} -o table.jsonl",
        f"mofq search table.jsonl{engine} {' '.join(advice.budget)} -o recipe.yaml",
        f"mofq validate {model} recipe.yaml --text OTHER_TEXT",
    ]
