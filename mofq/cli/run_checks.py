"""What `mofq run` refuses before it works for minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mofq.cli.calibrate import load_corpora, load_named
from mofq.cli.checks import check_device, check_engine, check_folder
from mofq.exceptions import BackendError, BudgetError, CorpusError

if TYPE_CHECKING:
    from mofq.cli.run import RunOptions
    from mofq.decision import Budgets
    from mofq.decision.recipe import Recipe
    from mofq.evidence.spaces import SearchSpace
    from mofq.model.checkpoint.headers import Checkpoint


def check_run(options: RunOptions) -> tuple[SearchSpace, RunOptions]:
    """Refuse now what would fail after minutes; fill in what the model decides.

    Returns:
        The search space, and the options with corpora and a sequence length that the
        model can take.
    """
    from mofq.decision import Budgets, check_budget
    from mofq.delivery.backends import find_exporter
    from mofq.engines import find_engine, legality
    from mofq.evidence.spaces import load_search_space, offer_schemes
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.layers import find_layers
    from mofq.model.sizes import parse_size

    check_folder(options.output)
    space = load_search_space(options.space)
    max_bytes = None if options.max_size is None else parse_size(options.max_size)
    check = None if options.engine is None else legality(options.engine)
    checkpoint = open_checkpoint(options.model)
    layers = find_layers(checkpoint)
    check_engine(options.engine, layers)
    offers = offer_schemes(space, layers.groups, legality=check, has_stats=True)
    budgets = Budgets(max_bits=options.max_bits, max_bytes=max_bytes, max_kl=options.max_kl)
    _need_budget(budgets, space)
    check_budget(offers, budgets, other_bytes=layers.other_bytes)
    corpora = options.corpora or ("demo-en-calibration",)
    _check_texts(corpora, options.text)
    if options.engine is not None:
        find_exporter(find_engine(options.engine).reads)
    check_device(options.device)
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    length = min(options.sequence_length, int(limit or options.sequence_length))
    _check_window(options.text, checkpoint, tokens=options.tokens, sequence_length=length)
    return space, replace(options, corpora=corpora, sequence_length=length)


def _check_window(
    source: str, checkpoint: Checkpoint, *, tokens: int, sequence_length: int
) -> None:
    """Refuse a text, or a number of tokens, that fills no window to validate on."""
    from mofq.evidence.corpora import tokenize
    from mofq.model.loading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    tokenize(load_named(source), tokenizer, tokens=tokens, sequence_length=sequence_length)


def _need_budget(budgets: Budgets, space: SearchSpace) -> None:
    if not budgets.any_given and any(one.is_unquantized for one in space.schemes):
        raise BudgetError(
            "mofq run: needed a budget, found none; without one every layer stays as it is. "
            "Give --max-bits, e.g. 5, --max-size, e.g. 4GB, or --max-kl, e.g. 0.02."
        )


def _check_texts(corpora: tuple[str, ...], source: str) -> None:
    text = load_named(source)
    for corpus in load_corpora(corpora):
        if corpus.sha256 == text.sha256:
            raise CorpusError(
                f"{source}: is the calibration corpus {corpus.name!r} too, and would flatter the "
                f"recipe. Validate on another text."
            )


def check_exported(options: RunOptions, candidates: Mapping[str, Recipe]) -> None:
    """Refuse to export into a folder that holds something else, before the long validation."""
    from mofq.decision.recipe import load_recipe

    folder = options.exported
    if options.engine is None or not folder.exists() or not any(folder.iterdir()):
        return
    inside = folder / "recipe.yaml"
    if not inside.is_file() or load_recipe(inside) not in candidates.values():
        raise BackendError(
            f"{folder}: holds another export than this run would write. Remove it, or run "
            f"with another -o."
        )
