"""LLM.int8() (arXiv:2208.07339): input columns with outliers stay in 16 bits.

    python scripts/reproduce/llm_int8.py MODEL --stats STATS --text FILE --work FOLDER

INT8 per channel and token, with the columns of a sequence's inputs that reach the threshold
left as they are, for the source's threshold of 6 and others; and how many values that is, over
all inputs of the calibration. The weights of such columns are INT8 too, as bitsandbytes serves
them. Emulated: no engine of `mofq engines` splits a product.

The source: "more than 99.9% of values are multiplied in 8-bit", "without any performance
degradation" for models of up to 175B parameters (abstract).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.measure.samples import SampleReader
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from scripts.shared.command import print_markdown
from scripts.shared.reproduction import (
    arguments,
    measure_recipes,
    print_measured,
    reference_of,
    uniform_of,
)

THRESHOLDS = (3, 6, 12, 24)


def print_shares(model: str, stats: str) -> None:
    """How much each threshold leaves in 16 bits, over the sequences of the calibration."""
    found = read_stats(Path(stats))
    corpus = found.plan.corpora[0].name
    kept, values, layers = dict.fromkeys(THRESHOLDS, 0), 0, dict.fromkeys(THRESHOLDS, 0)
    groups = find_layers(open_checkpoint(model)).groups
    with SampleReader(found) as reader:
        for group in groups:
            samples = reader.read(corpus, group.layers[0].name)
            assert samples is not None
            x_NTI = samples.x_MCI.abs().reshape(samples.sequences, -1, samples.x_MCI.shape[2])
            values += x_NTI.numel()
            for threshold in THRESHOLDS:
                columns_NI = x_NTI.amax(1) >= threshold
                kept[threshold] += int(columns_NI.sum()) * x_NTI.shape[1]
                layers[threshold] += bool(columns_NI.any())
    rows = [
        [str(t), f"{100 * kept[t] / values:.3f} %", f"{layers[t]} of {len(groups)}"]
        for t in THRESHOLDS
    ]
    print_markdown(["threshold", "values in 16 bits", "fusion groups with such a column"], rows)


def main(given: Sequence[str] | None = None) -> None:
    """Two tables."""
    options = arguments(
        __doc__, given, ("--stats", "from `mofq calibrate`"), ("--text", "held-out text")
    )
    print_shares(options.model, options.stats)
    names = ["int8.channel", "int8.channel+int8.token"]
    names += [f"int8.channel+int8.token.out{threshold}" for threshold in THRESHOLDS]
    recipes = {f"`{name}`": uniform_of(options.model, name) for name in names}
    print_measured(measure_recipes(reference_of(options), recipes))


if __name__ == "__main__":
    main()
