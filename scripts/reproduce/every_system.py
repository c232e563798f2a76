r"""Every system alone and the search over all of them, at equal true bits, on one model.

    python scripts/reproduce/every_system.py MODEL --stats STATS --text FILE --work FOLDER \
        [--calibration FILE] [--begun TABLE …]

A system is a set of schemes and a rule to choose by: one scheme for all layers (the one of
least predicted KL that keeps the budget), or a published mixture. The search may take any
scheme of any of them for any layer, and minimises nats. With the text that the statistics are of,
SmoothQuant, AWQ and bi-smoothing rewrite the model first (`mofq rewrite`), and the search chooses
the rewriting as well; the KL of what comes out is that to the original.

All choose on the statistics of the calibration; the KL is measured on the text, which none of them
has seen. Prints one Markdown table, KL in nats per token, the least of each column in bold, and one
of what each recipe is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mofq.decision import KL_UNIT, Budgets, Request, decide
from mofq.decision.from_table import TENSOR_MSE
from mofq.decision.recipe import Recipe
from mofq.evidence.table import Table, read_table
from mofq.exceptions import BudgetError, TableError
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import print_markdown, with_error
from scripts.shared.reproduction import (
    Measured,
    arguments,
    calibrated_anew,
    measure_recipes,
    measure_versions,
    predicted,
    reference_of,
    rewritten,
    table_of,
    uniform,
    version_of_rewritten,
)

SPACE = Path(__file__).with_name("every_system.yaml")
REWRITTEN_SPACE = Path(__file__).with_name("every_system_rewritten.yaml")
UNIFORM, SEARCH, GREEDY, TENSOR_GREEDY = "uniform", "search", "greedy", "greedy by tensor error"


@dataclass(frozen=True, slots=True)
class Budget:
    """A column: true bits, with room for the scales of a scheme per channel."""

    label: str
    max_bits: float
    activations: bool = False  #: whether inputs have 8 bits too


@dataclass(frozen=True, slots=True)
class System:
    """What one source offers, and how it chooses."""

    name: str
    schemes: str  #: regular expression, full match on a scheme's name
    choice: str = UNIFORM
    rewriting: str = ""  #: of the model before; see REWRITINGS


BUDGETS = (
    Budget("4.25", 4.27),
    Budget("4.5", 4.52),
    Budget("5", 5.02),
    Budget("6", 6.12),
    Budget("8", 8.12),
    Budget("8+8", 8.12, activations=True),
)
#: Methods of `mofq rewrite`; "" leaves the model as it is.
REWRITINGS = ("", "smoothquant", "bismooth", "awq")
_PLAIN = r"(channel|g\d+)"
SYSTEMS = (
    System("INT, rounding", rf"int\d\.{_PLAIN}(\+int8\.token)?"),
    System("FP, rounding", rf"fp\d_e\dm\d\.{_PLAIN}(\+fp8_e4m3\.token)?"),
    System(
        "MoFQ, tensor error",
        rf"(int|fp)\d(_e\dm\d)?\.{_PLAIN}(\+(int8|fp8_e4m3)\.token)?",
        TENSOR_GREEDY,
    ),
    System("MoFQ, nats", rf"(int|fp)\d(_e\dm\d)?\.{_PLAIN}(\+(int8|fp8_e4m3)\.token)?", GREEDY),
    System("clipping", rf".*\.{_PLAIN}@(mse|fullrange)"),
    System("OCP microscaling", r"mx(fp\d|int8)(_e\dm\d)?(\+mx.*)?"),
    System("shared microexponents", r"mx[469](\+mx[469])?"),
    System("NVFP4, four over six", r"nvfp4(@fouroversix)?"),
    System("LLM.int8()", r"int8\.channel\+int8\.token\.out6"),
    System("SwitchBack's pair", r"(int8|fp8_e4m3)\.tensor\+(int8|fp8_e4m3)\.token"),
    System("GPTQ", rf"int\d\.{_PLAIN}~gptq(\+int8\.token)?"),
    System("scales by nats", r"int\d\..*@nats"),
    System("MoFQ then GPTQ", rf"(int|fp)\d(_e\dm\d)?\.{_PLAIN}(@nats)?~gptq(\+.*)?", GREEDY),
    System("GPTQ, scales by nats", rf"int\d\.{_PLAIN}@nats~gptq"),
    System("SmoothQuant", r"int8\.channel\+int8\.token", rewriting="smoothquant"),
    System("bi-smoothing", r"int8\.channel\+int8\.token", rewriting="bismooth"),
    System("AWQ", rf"int\d\.{_PLAIN}", rewriting="awq"),
    System("search over all", r".*", SEARCH),
)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A model, as it is or rewritten, its calibration and its table."""

    model: str
    stats: Path
    table: Table


def rewrite(model: str, method: str, *, stats: Path, calibration: str, work: Path) -> Rewritten:
    """Rewrite a model, calibrate it anew and measure it; what is there is left alone."""
    folder = rewritten(model, stats, work / method, method)
    own = calibrated_anew(folder, calibration, work / f"{method}-stats", like=stats)
    table = table_of(str(folder), REWRITTEN_SPACE, stats=own, path=work / f"{method}.jsonl")
    return Rewritten(str(folder), own, table)


def of_schemes(table: Table, pattern: str, *, activations: bool) -> Table:
    """The table without all other schemes; where inputs are quantized, bf16 is another."""

    def fits(name: str) -> bool:
        if name == "bf16":
            return pattern == r".*"
        has_activation = parse_scheme(name).activation is not None
        return has_activation == activations and re.fullmatch(pattern, name) is not None

    rows = tuple(row for row in table.rows if fits(row.scheme))
    return replace(table, rows=rows, spaces=())


def best_uniform(table: Table, max_bits: float) -> Recipe | None:
    """The scheme of least predicted KL; its group size may be smaller where it does not fit."""
    names = dict.fromkeys(row.scheme for row in table.rows)
    found = [one for name in names if (one := uniform(table, *_spellings(name))) is not None]
    fitting = [one for one in found if bits_of(table, one) <= max_bits]
    return min(fitting, key=lambda one: predicted(table, one), default=None)


def bits_of(table: Table, recipe: Recipe) -> float:
    """Bits per weight of a recipe whose schemes a table has."""
    size = {(row.group, row.scheme): row.bytes for row in table.rows}
    return 8 * sum(size[one.name, one.scheme] for one in recipe.groups) / table.header.weights


def _spellings(name: str) -> list[str]:
    return [name, *(name.replace(".g128", f".g{size}", 1) for size in (64, 32) if ".g128" in name)]


def choose(table: Table, system: System, budget: Budget) -> Recipe | None:
    """The recipe of a system for a budget; None where it has none."""
    own = of_schemes(table, system.schemes, activations=budget.activations)
    if not own.rows:
        return None
    if system.choice == UNIFORM:
        return best_uniform(own, budget.max_bits)
    request = Request(
        Budgets(max_bits=budget.max_bits),
        solver="exact" if system.choice == SEARCH else "greedy",
        unit=TENSOR_MSE if system.choice == TENSOR_GREEDY else KL_UNIT,
        ties=False,
    )
    try:
        return decide(own, request).recipe
    except (BudgetError, TableError):
        return None


def print_results(
    chosen: Mapping[tuple[str, str], tuple[str, Recipe]], done: Mapping[str, Measured]
) -> None:
    """The two tables."""
    labels = [budget.label for budget in BUDGETS]
    least = {
        label: min(done[f"{s}, {b}"].kl for s, b in chosen if b == label)
        for label in labels
        if any(b == label for _, b in chosen)
    }
    costs, contents = [], []
    for system in SYSTEMS:
        row = [system.name]
        for label in labels:
            one = done.get(f"{system.name}, {label}")
            if one is None:
                row.append("–")
                continue
            shown = with_error(one.kl, one.kl_stderr, digits=5)
            row.append(f"**{shown}**" if one.kl == least[label] else shown)
        costs.append(row)
        for label in labels:
            found = chosen.get((system.name, label))
            if found is not None:
                rewriting, of = found
                bits = done[f"{system.name}, {label}"].bits_per_weight
                contents.append([system.name, label, rewriting or "–", f"{bits:.3f}", _content(of)])
    print_markdown(["KL [nats/token] at bits", *labels], costs)
    print_markdown(["system", "at", "rewriting", "bits/weight", "schemes: fusion groups"], contents)


def _content(of: Recipe) -> str:
    names = [group.scheme for group in of.groups]
    counts = sorted({name: names.count(name) for name in names}.items(), key=lambda one: -one[1])
    shown = [f"`{name}`: {count}" for name, count in counts[:4]]
    return ", ".join(shown) + (f", {len(counts) - 4} more" if len(counts) > 4 else "")


def choose_among(
    places: Mapping[str, Rewritten], system: System, budget: Budget
) -> tuple[str, Recipe] | None:
    """The rewriting and the recipe of a system; the search takes the one of least prediction."""
    names = list(places) if system.choice == SEARCH else [system.rewriting]
    found = {
        name: recipe
        for name in names
        if name in places and (recipe := choose(places[name].table, system, budget)) is not None
    }
    if not found:
        return None
    name = min(found, key=lambda one: predicted(places[one].table, found[one]))
    return name, found[name]


def measure(
    places: Mapping[str, Rewritten],
    chosen: Mapping[tuple[str, str], tuple[str, Recipe]],
    options: argparse.Namespace,
) -> dict[str, Measured]:
    """The KL of every recipe to the original model."""
    # The search first: should the time run out, the rest is what it is compared with.
    order = sorted(chosen, key=lambda key: key[0] != SYSTEMS[-1].name)
    reference = reference_of(options)
    plain = {", ".join(key): chosen[key][1] for key in order if not chosen[key][0]}
    done = measure_recipes(reference, plain, stats=places[""].stats)
    versions = {
        ", ".join(key): version_of_rewritten(places[name].model, recipe, places[name].stats)
        for key in order
        for name, recipe in [chosen[key]]
        if name
    }
    return done | measure_versions(reference, versions)


def main(given: Sequence[str] | None = None) -> None:
    """Measure the tables, choose, measure the recipes."""
    options = arguments(
        __doc__,
        given,
        ("--stats", "from `mofq calibrate`"),
        ("--text", "held-out text"),
        optional=[
            ("--calibration", "text of the stats; rewrites the model by each method too"),
            ("--rewritings", "only these methods, with commas between them"),
            ("--table", "a table to choose from as it is, and nothing is measured for it"),
        ],
    )
    stats, path = Path(options.stats), options.work / "all.jsonl"
    if options.table:
        table = read_table(Path(options.table))
    else:
        table = table_of(options.model, SPACE, stats=stats, path=path, begun=options.begun)
    places = {"": Rewritten(options.model, stats, table)}
    methods = options.rewritings.split(",") if options.rewritings else REWRITINGS[1:]
    for method in methods if options.calibration else ():
        places[method] = rewrite(
            options.model,
            method,
            stats=stats,
            calibration=options.calibration,
            work=options.work,
        )
    chosen = {
        (system.name, budget.label): found
        for system in SYSTEMS
        for budget in BUDGETS
        if (found := choose_among(places, system, budget)) is not None
    }
    print_results(chosen, measure(places, chosen, options))


if __name__ == "__main__":
    main()
