"""What tokens that change their experts cost: predicted, and measured with routers held and free.

    python scripts/bench/routing.py MODEL --calibration FILE --text FILE --work FOLDER

Uniform schemes, searched and random recipes of a mixture of experts, 2 to 8 bits (`routing.yaml`).
Each is measured twice on the same text: with every token at the experts that the original sends it
to, weighed by the new scores, and free. The first is what the sum over groups predicts, the second
what a user sees.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.decision import Problem, request_problem
from mofq.decision.prediction import predict
from mofq.decision.recipe import Recipe, load_recipe
from mofq.delivery.backends import apply_recipe
from mofq.evidence.corpora import load_text
from mofq.evidence.metrics import kl_divergence
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.loading import load_model
from scripts.shared.command import (
    measured_table,
    model_parser,
    mofq,
    parse_into_work,
    print_markdown,
)
from scripts.shared.kl_truth import text_windows

SPACE = Path(__file__).with_suffix(".yaml")
BUDGETS = (2.6, 2.8, 3.0, 3.3, 3.6, 4.0, 4.3, 4.6, 5.0, 5.5, 6.0, 7.0)
RANDOM = 10
#: Schemes that a random recipe mixes.
MIXED = 4
_COLUMNS = (
    "recipe",
    "sum over groups",
    "held",
    "with changes of experts",
    "free",
    "sum / held",
    "sum / free",
    "with changes / free",
)


@dataclass(slots=True)
class Router:
    """Takes the place of a router's forward, and sends tokens where they are told to go."""

    module: Any
    chosen: list[Tensor] = field(default_factory=list)  #: of each window
    window: int = 0
    is_held: bool = False

    def __call__(self, hidden_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, weights and choice, as transformers' routers give them."""
        hidden_TI = hidden_TI.reshape(-1, hidden_TI.shape[-1])
        scores_TE = torch.nn.functional.linear(hidden_TI, self.module.weight)
        share_TE = scores_TE.softmax(-1, dtype=torch.float32)
        index_TK = share_TE.topk(self.module.top_k).indices
        if self.is_held:
            index_TK = self.chosen[self.window]
        elif len(self.chosen) == self.window:
            self.chosen.append(index_TK)
        self.window += 1
        weight_TK = share_TE.gather(1, index_TK)
        if getattr(self.module, "norm_topk_prob", True):
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return scores_TE, weight_TK.to(scores_TE.dtype), index_TK


def routers_of(model: torch.nn.Module) -> list[Router]:
    """Of all decoder layers, in order, in the place of the model's own."""
    found = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            router = Router(module)
            module.forward = router  # type: ignore[assignment]
            found.append(router)
    return found


@torch.inference_mode()
def run(model: Any, windows_NT: Tensor, routers: Sequence[Router], *, held: bool) -> Tensor:
    """The logits of all windows, [N T, V]."""
    for router in routers:
        router.window, router.is_held = 0, held
    return torch.cat([model(token_T[None]).logits[0] for token_T in windows_NT])


def random_recipes(problem: Problem) -> dict[str, dict[str, str]]:
    """Recipes that give each group one of a few schemes, weights alone and with inputs in turn."""
    rng = random.Random(0)
    schemes = sorted(set(problem.schemes) - {"bf16"})
    weights_only = [name for name in schemes if "+" not in name]
    found = {}
    for number in range(RANDOM):
        pool = rng.sample(schemes if number % 2 else weights_only, MIXED)
        found[f"random {number}"] = {group.name: rng.choice(pool) for group in problem.groups}
    return found


def with_schemes(recipe: Recipe, schemes: Mapping[str, str]) -> Recipe:
    """A recipe of the same groups."""
    groups = tuple(replace(group, scheme=schemes[group.name]) for group in recipe.groups)
    return replace(recipe, groups=groups)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the recipes, predict and measure them, print the table."""
    paths = (
        ("--calibration", "text file, or the name of a bundled text"),
        ("--text", "text to measure on"),
    )
    parser = model_parser(__doc__, *paths, tokens=4096)
    parser.add_argument("--sequence-length", type=int, default=512, help="of both")
    options = parse_into_work(parser, arguments)
    path = measured_table(options, SPACE, "en", "--sequence-length", options.sequence_length)
    problem = request_problem(read_table(path))
    recipes: dict[str, Recipe] = {}
    for bits in BUDGETS:
        made = options.work / f"recipe-{bits}.yaml"
        mofq("search", path, "--max-bits", bits, "-o", made)
        recipes[f"searched, {bits} bits"] = load_recipe(made)
    first = next(iter(recipes.values()))
    others = {
        name: dict.fromkeys((group.name for group in problem.groups), name)
        for name in sorted(set(problem.schemes) - {"bf16"})
    }
    for name, schemes in (others | random_recipes(problem)).items():
        recipes[name] = with_schemes(first, schemes)
    print_markdown(_COLUMNS, rows_of(options, problem, recipes))


def rows_of(options: Any, problem: Problem, recipes: Mapping[str, Recipe]) -> list[list[str]]:
    """A row for each recipe, and the medians."""
    checkpoint = open_checkpoint(options.model)
    windows_NT = text_windows(
        checkpoint,
        load_text(options.text),
        windows=options.tokens // options.sequence_length,
        sequence_length=options.sequence_length,
    )
    original = load_model(checkpoint.folder)
    routers = routers_of(original)
    logits = run(original, windows_NT, routers, held=False)
    rows, ratios = [], []
    for name, recipe in recipes.items():
        model = load_model(checkpoint.folder)
        apply_recipe(model, recipe, "emulate", checkpoint=checkpoint)
        own = routers_of(model)
        for router, known in zip(own, routers, strict=True):
            router.chosen = known.chosen
        held, free = (
            float(kl_divergence(logits, run(model, windows_NT, own, held=each)).double().mean())
            for each in (True, False)
        )
        choice_F = problem.choice_of({group.name: group.scheme for group in recipe.groups})
        alone = predict(replace(problem, flip_FC=None), choice_F).value
        whole = predict(problem, choice_F).value
        ratios.append((alone / held, alone / free, whole / free))
        shown = [f"{value:.5f}" for value in (alone, held, whole, free)]
        rows.append([name, *shown, *(f"{ratio:.2f}" for ratio in ratios[-1])])
    columns = list(zip(*ratios, strict=True))
    off = [[abs(ratio - 1) for ratio in column] for column in columns]
    blank = [""] * 4
    rows.append(["median", *blank, *(f"{statistics.median(each):.2f}" for each in columns)])
    rows.append(["median off", *blank, *(f"{statistics.median(each):.1%}" for each in off)])
    rows.append(["worst off", *blank, *(f"{max(each):.1%}" for each in off)])
    return rows


if __name__ == "__main__":
    main()
