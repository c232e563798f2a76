"""SmoothQuant (arXiv:2211.10438), AWQ (arXiv:2306.00978) and bi-smoothing on one model.

    python scripts/reproduce_smoothquant_awq.py MODEL --stats STATS --calibration FILE \
        --text FILE --work FOLDER

Rewrites the model by each method for INT8 per channel and token, and by AWQ for INT4 groups of
128. Prints what rewriting itself costs (the bf16 rounding of the moved weights), the KL of the
uniform scheme before and after against the model that it was applied to, and what a search over
INT8 and FP8 per fusion group makes of the rewritten model, calibrated anew.

`--methods` names some of the methods.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction import (
    Measured,
    Version,
    arguments,
    measure_recipes,
    measure_versions,
    mofq,
    print_markdown,
    stats_of,
    uniform_of,
    with_error,
)

from mofq.checkpoint.headers import open_checkpoint
from mofq.checkpoint.model import load_model
from mofq.recipe import load_recipe

INT8 = ("int8.channel+int8.token",)
FP8 = ("fp8_e4m3.channel+fp8_e4m3.token",)
INT4 = ("int4.g128", "int4.g64", "int4.g32")
#: Label -> method and further words of `mofq rewrite`.
METHODS: dict[str, tuple[str, ...]] = {
    "smoothquant": ("smoothquant",),
    "bismooth": ("bismooth",),
    "bismooth, powers of two": ("bismooth", "--powers-of-two"),
    "awq": ("awq",),
}


def rewritten(model: str, label: str, *, stats: str, work: Path) -> str:
    """The folder of a rewritten model, made unless it is there."""
    folder = work / label.replace(", ", "-").replace(" ", "-")
    if not folder.exists():
        method, *words = METHODS[label]
        mofq("rewrite", model, "--stats", stats, "--method", method, *words, "-o", folder)
    return str(folder)


def rewriting_cost(model: str, folder: str, text: str, *, cache: Path, tokens: int) -> Measured:
    """The rewritten model against the original, nothing quantized."""
    version = Version(folder, 16.0, lambda _model: load_model(Path(folder)))
    return measure_versions(model, {folder: version}, text, cache=cache, tokens=tokens)[folder]


def main(given: Sequence[str] | None = None) -> None:
    """Rewrite, measure, search, print."""
    words = list(sys.argv[1:] if given is None else given)
    methods = list(METHODS)
    if "--methods" in words:
        at = words.index("--methods")
        methods = words[at + 1].split(";")
        del words[at : at + 2]
    paths = (
        ("--stats", "from mofq calibrate"),
        ("--calibration", "text that the stats are of"),
        ("--text", "that nothing was calibrated on"),
    )
    options = arguments(__doc__, words, *paths)
    work, tokens, text = options.work, options.tokens, options.text
    cache = work / "measured.jsonl"
    rows = []
    for label in ["plain", *methods]:
        is_plain, is_awq = label == "plain", label == "awq"
        folder = options.model
        if not is_plain:
            folder = rewritten(options.model, label, stats=options.stats, work=work)
        recipes = {}
        if not is_awq:
            recipes |= {"INT8": uniform_of(folder, *INT8), "FP8": uniform_of(folder, *FP8)}
        if is_awq or (is_plain and "awq" in methods):
            recipes["INT4 g128"] = uniform_of(folder, *INT4)
        if not is_awq:
            recipes["INT8/FP8 searched"] = load_recipe(
                searched(folder, label, options.calibration, options.stats, work)
            )
        done = measure_recipes(folder, recipes, text, cache=cache, tokens=tokens)
        cost = "–"
        if not is_plain:
            one = rewriting_cost(options.model, folder, text, cache=cache, tokens=tokens)
            cost = f"{one.kl:.1e}"
        for name, one in done.items():
            rows.append([label, cost, name, with_error(one.kl, one.kl_stderr)])
    print_markdown(["model", "KL of rewriting", "scheme", "KL [nats/token]"], rows)


def searched(model: str, label: str, calibration: str, stats: str, work: Path) -> Path:
    """The best mixture of INT8 and FP8 in nats, by statistics of this model."""
    name = label.replace(", ", "-").replace(" ", "-")
    path = work / f"{name}.yaml"
    if not path.exists():
        own = stats
        if label != "plain":
            own = str(stats_of(model, {"en": calibration}, work / f"{name}-stats"))
        table = work / f"{name}.jsonl"
        mofq("measure", model, "--space", "w8a8", "--stats", own, "-o", table)
        mofq("search", table, "--max-bits", "8.1", "-o", path)
    assert load_recipe(path).index_sha256 == open_checkpoint(model).index_sha256
    return path


if __name__ == "__main__":
    main()
