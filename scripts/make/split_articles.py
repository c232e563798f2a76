"""Cut a text of articles into two halves: one to calibrate on, one to measure on.

    python scripts/make/split_articles.py wiki.valid.tokens -o FOLDER

Articles go to the halves in turn, so that both hold the same kinds of text and share no
article. (The first and the second half of a text may differ: the KL divergence of the same
recipe is 12 % higher on the second half of WikiText-2's validation text than on the first.)
An article begins with a heading of the first level, ``= Title =``. Writes
``calibration.txt`` and ``measurement.txt``.
"""

from __future__ import annotations

import re
from pathlib import Path

from scripts.shared.command import script_parser

_HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


def article_halves(text: str) -> tuple[str, str]:
    """The articles of a text dealt out in turn.

    Args:
        text: With headings of the first level; what stands before the first one is left out.

    Returns:
        The first, third, fifth … article, and the second, fourth …
    """
    starts = [match.start() for match in _HEADING.finditer(text)]
    if len(starts) < 2:
        raise SystemExit("the text has fewer than two headings of the form '= Title ='.")
    articles = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    return "".join(articles[0::2]), "".join(articles[1::2])


def main() -> None:
    """Write both halves."""
    parser = script_parser(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    halves = article_halves(options.text.read_text("utf-8"))
    for name, half in zip(("calibration", "measurement"), halves, strict=True):
        (options.output / f"{name}.txt").write_text(half, "utf-8")


if __name__ == "__main__":
    main()
