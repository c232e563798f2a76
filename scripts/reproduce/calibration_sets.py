r"""How much a recipe depends on the calibration text (the question of arXiv:2405.20835).

    python scripts/reproduce/calibration_sets.py MODEL --calibration en=FILE --calibration pt=FILE \
        --text en=FILE --text pt=FILE --work FOLDER

To the named texts it adds `code`, Python's own standard library, and `random`, tokens drawn
evenly from the vocabulary; and `none`, the relative error of the weights, which needs no text.
One search space, one budget; every text chooses a recipe. The sequences of each text are also
halved: how far the recipes of two halves of one text are apart is the yardstick for how far
those of two texts are. Prints the measured KL of all recipes on the held-out texts and draws
`overlap.png`: the share of the weights that two recipes give the same scheme.

The source, for GPTQ, AWQ and SmoothQuant: "newer models like Llama-2 7B, Llama-3 8B, Command-R
35B, and Mistral 7B demonstrate strong robustness" to the calibration set, the older OPT not
(abstract; no figure).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

from mofq.decision import KL_UNIT, Budgets, Request, decide
from mofq.decision.recipe import Recipe
from mofq.evidence.corpora import load_text
from mofq.evidence.standard_error import standard_error
from mofq.evidence.table import Row, Table, read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.loading import load_tokenizer
from scripts.shared.command import model_parser, mofq, parse_into_work, print_markdown, with_error
from scripts.shared.reproduction import Measured, measure_recipes, reference_of, stats_of

matplotlib.use("agg")
from matplotlib import pyplot

SPACE = Path(__file__).with_name("calibration_sets.yaml")
MAX_BITS = 5.0
#: Tokens of the random text; more than any calibration here reads.
RANDOM_TOKENS = 20_000


def write_code(path: Path) -> Path:
    """Text that looks like code: modules of the standard library, by name, until 400 kB."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = ""
    for module in sorted(folder.glob("*.py")):
        text += module.read_text("utf-8")
        if len(text) > 400_000:
            break
    path.write_text(text, encoding="utf-8")
    return path


def write_random(model: str, path: Path) -> Path:
    """Random tokens as text; read back, neighbours may join to other tokens."""
    tokenizer = load_tokenizer(open_checkpoint(model).folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(tokenizer), (RANDOM_TOKENS,), generator=generator)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    path.write_text(str(text), encoding="utf-8", errors="replace")
    return path


def of_sequences(table: Table, corpus: str, chosen: slice) -> Table:
    """The table as one corpus, and of it some sequences, would have made it."""
    rows = []
    for row in table.rows:
        if row.unit == KL_UNIT and row.corpus == corpus:
            rows.append(_some(row, chosen))
    stats = table.header.stats
    assert stats is not None
    header = replace(
        table.header,
        stats=replace(
            stats,
            corpora={corpus: stats.corpora[corpus]},
            samples=len(range(*chosen.indices(stats.samples))),
        ),
    )
    return replace(table, header=header, rows=tuple(rows))


def _some(row: Row, chosen: slice) -> Row:
    assert row.sample_errors is not None
    errors = row.sample_errors[chosen]
    stderr = standard_error(np.array(errors))
    return replace(row, error=float(np.mean(errors)), stderr=stderr, sample_errors=errors)


def recipes_of(table: Table) -> dict[str, Recipe]:
    """Label -> recipe: each text whole and in halves, and none."""
    budgets = Budgets(max_bits=MAX_BITS)
    stats = table.header.stats
    assert stats is not None
    half = stats.samples // 2
    recipes = {}
    for corpus in stats.corpora:
        parts = {
            corpus: slice(None),
            f"{corpus} 1/2": slice(half),
            f"{corpus} 2/2": slice(half, None),
        }
        for label, chosen in parts.items():
            some = of_sequences(table, corpus, chosen)
            recipes[label] = decide(some, Request(budgets, unit=KL_UNIT, ties=False)).recipe
    free = Request(budgets, unit="relative_weight_error")
    recipes["none"] = decide(table, free).recipe
    return recipes


def overlap(a: Recipe, b: Recipe, weights: Mapping[str, int]) -> float:
    """The share of the weights that two recipes give the same scheme."""
    theirs = {group.name: group.scheme for group in b.groups}
    same = sum(weights[one.name] for one in a.groups if theirs[one.name] == one.scheme)
    return same / sum(weights.values())


def draw(recipes: Mapping[str, Recipe], table: Table, path: Path) -> np.ndarray:
    """The figure; returns the shares."""
    weights = {group.name: group.weights for group in table.header.groups}
    shares = np.array(
        [[overlap(a, b, weights) for b in recipes.values()] for a in recipes.values()]
    )
    figure, axes = pyplot.subplots(figsize=(8, 7), constrained_layout=True)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(recipes)), list(recipes), rotation=60, ha="right")
    axes.set_yticks(range(len(recipes)), list(recipes))
    for (y, x), share in np.ndenumerate(shares):
        color = "white" if share < 0.6 else "black"
        axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, label="share of the weights with the same scheme", shrink=0.8)
    axes.set_title(f"recipes of {MAX_BITS:g} bits by calibration text")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return shares


def print_costs(
    recipes: Mapping[str, Recipe],
    done: Mapping[str, Mapping[str, Measured]],
    shares: np.ndarray,
) -> None:
    """One row for each calibration text: its KL, that of its halves, and their overlap."""
    labels = list(recipes)
    rows = []
    for label in labels:
        if "/" in label:
            continue
        halves = [labels.index(f"{label} {n}/2") for n in (1, 2) if f"{label} {n}/2" in labels]
        row = [label]
        for of in done.values():
            spread = " / ".join(f"{of[labels[n]].kl:.4f}" for n in halves) or "–"
            row += [with_error(of[label].kl, of[label].kl_stderr), spread]
        row.append(f"{100 * shares[halves[0], halves[1]]:.0f} %" if halves else "–")
        row.append(f"{100 * shares[labels.index(label), 0]:.0f} %")
        rows.append(row)
    columns = ["calibrated on"]
    for text in done:
        columns += [f"KL on {text}", "of its halves"]
    print_markdown([*columns, "overlap of the halves", f"overlap with {labels[0]}"], rows)


def main(given: Sequence[str] | None = None) -> None:
    """The table and the figure."""
    parser = model_parser(__doc__)
    parser.add_argument("--calibration", action="append", required=True, help="NAME=FILE")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE, held out")
    parser.add_argument("--sequences", type=int, default=4, help="of each calibration text")
    options = parse_into_work(parser, given)
    corpora = dict(one.split("=", 1) for one in options.calibration)
    corpora["code"] = str(write_code(options.work / "code.txt"))
    corpora["random"] = str(write_random(options.model, options.work / "random.txt"))
    stats = stats_of(options.model, corpora, options.work / "stats", sequences=options.sequences)
    path = options.work / "table.jsonl"
    mofq("measure", options.model, "--space", SPACE, "--stats", stats, "-o", path)
    table = read_table(path)
    recipes = recipes_of(table)
    done = {}
    for one in options.text:
        name, _, source = one.partition("=")
        reference = reference_of(options, text=load_text(source))
        done[name] = measure_recipes(reference, recipes)
    shares = draw(recipes, table, options.work / "overlap.png")
    print_costs(recipes, done, shares)


if __name__ == "__main__":
    main()
