"""What a step of tuning takes with products in float32 and in bfloat16: processor time.

    python scripts/bench/tuning.py MODEL

One sequence runs forward and backward to norms and to the weights of linear layers, by turns in
both, on the threads of the process; the fastest of each counts. Where the processor has no
instructions for bfloat16 both are float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from time import process_time

import torch

from mofq.delivery.tuning.products import in_bfloat16
from mofq.delivery.tuning.tune import send_divergence
from mofq.model.loading import load_model
from scripts.shared.command import print_markdown


def main(arguments: Sequence[str] | None = None) -> None:
    """Time both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder")
    parser.add_argument("--tokens", type=int, default=512, help="of the sequence")
    parser.add_argument("--times", type=int, default=3, help="each is run")
    options = parser.parse_args(arguments)
    model = load_model(options.model, dtype="float32", device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name and "lm_head" not in name)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token_NT = torch.randint(vocabulary, (1, options.tokens), generator=generator)
    with torch.no_grad():
        reference_TV = 1.1 * model(token_NT).logits[0]
    contexts: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "float32": nullcontext,
        "bfloat16": partial(in_bfloat16, model, torch.device("cpu")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(options.times):
        for name, context in contexts.items():
            before = process_time()
            with context():
                logits_TV = model(token_NT).logits[0]
            send_divergence(logits_TV, reference_TV)
            seconds[name].append(process_time() - before)
            model.zero_grad()
    best = {name: min(found) for name, found in seconds.items()}
    rows = [[name, f"{s:.2f} s", f"{s / best['float32']:.2f}"] for name, s in best.items()]
    print_markdown(["products", "processor time", "of float32's"], rows)


if __name__ == "__main__":
    main()
