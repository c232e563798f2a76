"""Makes a multiple-choice task for lm-eval from a text: which of four is how it goes on?

    python scripts/make/continuation_task.py --text demo-en --name continuation_en -o FOLDER
    mofq validate MODEL RECIPE --text demo-en --tasks continuation_en --task-folder FOLDER

Each item is a passage of the text and four continuations of equal length in words, all
of which start at a word of the same text: the true one, and three from elsewhere. Passages
do not overlap. Guessing gets a quarter right. What is written is a YAML file of lm-eval's
format and the items as JSON lines; the items depend on the text, the sizes and the seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import yaml

from mofq.evidence.corpora import load_text
from scripts.shared.command import script_parser

CHOICES = 4


def make_items(
    text: str, *, context_words: int, continuation_words: int, seed: int
) -> list[dict[str, object]]:
    """The items of a text, in its order.

    Args:
        text: Of at least a few hundred words.
        context_words: In a passage.
        continuation_words: In each choice.
        seed: Of the choice and order of what is wrong.
    """
    words = text.split()
    step = context_words + continuation_words
    starts = range(0, len(words) - step + 1, step)
    draw = random.Random(seed)
    items = []
    for start in starts:
        cut = start + context_words
        places = [cut]
        while len(places) < CHOICES:
            place = draw.randrange(len(words) - continuation_words)
            if all(abs(place - other) >= step for other in places):
                places.append(place)
        order = draw.sample(range(CHOICES), CHOICES)
        choices = [" " + " ".join(words[places[n] : places[n] + continuation_words]) for n in order]
        items.append(
            {
                "context": " ".join(words[start:cut]),
                "choices": choices,
                "answer": order.index(0),
            }
        )
    return items


def write_task(items: Sequence[dict[str, object]], folder: Path, name: str) -> None:
    """Write the task's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the items and write them."""
    parser = script_parser(__doc__)
    parser.add_argument("--text", required=True, help="bundled text, file or hub data set")
    parser.add_argument("--name", required=True, help="of the task")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--context-words", type=int, default=32)
    parser.add_argument("--continuation-words", type=int, default=8)
    parser.add_argument("--items", type=int, help="at most so many, spread over the text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    items = make_items(
        load_text(options.text).text,
        context_words=options.context_words,
        continuation_words=options.continuation_words,
        seed=options.seed,
    )
    if not items:
        parser.error(f"--text {options.text}: too short for one item")
    items = items[:: max(1, len(items) // (options.items or len(items)))][: options.items]
    write_task(items, options.output, options.name)
    print(f"{options.output / options.name}.yaml: {len(items)} items")


if __name__ == "__main__":
    main()
