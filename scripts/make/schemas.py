"""Write the JSON Schemas that editors use into ``docs/schemas``."""

from __future__ import annotations

import json
from pathlib import Path

from mofq.decision.recipe import RECIPE_SCHEMA
from mofq.engines.devices import DEVICE_MODEL_SCHEMA
from mofq.evidence.spaces import SEARCH_SPACE_SCHEMA
from mofq.evidence.table import TABLE_LINE_SCHEMA

FOLDER = Path(__file__).parent.parent.parent / "docs" / "schemas"


def schema_texts() -> dict[str, str]:
    """File name -> text of every published schema."""
    schemas = {
        "search_space": SEARCH_SPACE_SCHEMA,
        "device_model": DEVICE_MODEL_SCHEMA,
        "recipe": RECIPE_SCHEMA,
        "table_line": TABLE_LINE_SCHEMA,
    }
    return {
        f"{name}.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in schemas.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in schema_texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
