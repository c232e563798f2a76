"""One self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from mofq.exceptions import MofqError
from mofq.files.documents import write_beside_and_rename

#: What mail servers and chats still take.
MOST_BYTES = 6_000_000

_STYLES = ("vendor/uPlot.min.css", "explorer.css")
_SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "model.js",
    "chart.js",
    "map.js",
    "profile.js",
    "explorer.js",
)
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def page_html(data: dict[str, Any]) -> str:
    """The page of some data.

    No name of a table or recipe becomes part of the markup: all of them stand in
    one JSON block, in which ``<``, ``>`` and ``&`` are escaped, and the script
    writes them as text. The policy allows the page's own scripts and styles by their
    hashes, and no request at all.

    Args:
        data: From `page_data`.

    Returns:
        HTML.
    """
    style = "\n".join(_read(name) for name in _STYLES)
    script = "\n".join(_read(name) for name in _SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source(script)}",
            f"style-src {_source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {
        "policy": html.escape(policy, quote=False),
        "title": html.escape(f"{data['model']} · mofq"),
        "style": style,
        "data": _json(data),
        "script": script,
    }
    # In one pass: a name that looks like a place is not taken for one.
    return _PLACE.sub(lambda found: parts[found[1]], _read("explorer.html"))


def write_page(data: dict[str, Any], path: Path) -> int:
    """Write a page.

    Returns:
        Its size in bytes.

    Raises:
        MofqError: It would be larger than `MOST_BYTES`, or cannot be written.
    """
    page = page_html(data)
    size = len(page.encode())
    if size > MOST_BYTES:
        raise MofqError(
            f"{path}: the page would have {size:,} bytes, more than {MOST_BYTES:,}. "
            f"Measure fewer schemes into one table."
        )
    write_beside_and_rename(path, page)
    return size


def _json(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _source(text: str) -> str:
    """How a content security policy names an inline text."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(name: str) -> str:
    return files("mofq.explore").joinpath("page", *name.split("/")).read_text("utf-8")
