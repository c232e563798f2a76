"""One format of the KV cache for the whole model, where an engine holds no more."""

from __future__ import annotations

from dataclasses import replace

from mofq.decide.choice import Decision, decide
from mofq.decide.request import Request, request_problem
from mofq.exceptions import BudgetError
from mofq.table import Table


def settle_cache(table: Table, request: Request) -> Request:
    """The request with the one quantized format of the cache that serves it best.

    Engines hold one format for all layers but those that stay as they are. So each format that
    the engine serves is decided with by itself, and that of the best recipe is kept.

    Args:
        table: What is decided on.
        request: Without an engine, or a cache to decide, it is returned as it is.

    Raises:
        BudgetError: No recipe keeps the budgets with any format.
    """
    if not request.kv_cache or request.engine is None:
        return request
    problem = request_problem(table, request)
    groups = [number for number, group in enumerate(problem.groups) if group.cached]
    names = [problem.schemes[p] for number in groups for p in problem.options_of(number)]
    formats = [name for name in dict.fromkeys(names) if name != "bf16"]
    if len(formats) < 2:
        return request
    plain = replace(request, solver="exact", ties=False)
    found: list[tuple[tuple[float, float], str]] = []
    problems = []
    for name in formats:
        try:
            decision = decide(table, replace(plain, kv_formats=(name,)))
        except BudgetError as problem_:
            problems.append(problem_)
        else:
            found.append((_rank(decision, request), name))
    if not found:
        raise problems[0]
    return replace(request, kv_formats=(min(found)[1],))


def _rank(decision: Decision, request: Request) -> tuple[float, float]:
    """Least size where size is minimised, else least error; then the other."""
    result = decision.recipe.result
    error = float(result["error"] or 0.0)
    size = float(result["checkpoint_bytes"] or 0.0)
    size += request.kv_tokens * float(result.get("kv_bytes_per_token") or 0.0)
    return (size, error) if request.budgets.minimises_bytes else (error, size)
