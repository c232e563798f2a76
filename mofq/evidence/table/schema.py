"""The JSON Schema of each kind of table line: the reader checks with it, editors get it."""

from __future__ import annotations

from typing import Any

from mofq.evidence.table.lines import UNITS
from mofq.files.documents import strict_object

TABLE_VERSION = 1

_NAME = {"type": "string", "pattern": "."}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_COUNT = {"type": "integer", "minimum": 1}
#: Sums of them stay far below 2**63.
_BYTES = {"type": "integer", "minimum": 0, "maximum": 2**50}
_NAMES = {"type": "array", "items": _NAME, "uniqueItems": True}
_NOT_NEGATIVE = {"type": "number", "minimum": 0}


def _floats(what: str) -> dict[str, Any]:
    return {
        "type": "string",
        "contentEncoding": "base64",
        "description": f"{what}: little-endian IEEE binary32, one after another",
    }


_LAYER = strict_object(
    {
        "name": _NAME,
        "out_features": _COUNT,
        "in_features": _COUNT,
        "dtype": _NAME,
        "decoder_layer": {"type": ["integer", "null"], "minimum": 0},
        "module": _NAME,
    }
)
_GROUP = strict_object(
    {
        "name": _NAME,
        "layers": {"type": "array", "minItems": 1, "items": _LAYER},
        "source_bytes": _BYTES,
    }
)
_STATS = strict_object(
    {
        "sha256": _SHA256,
        "seed": {"type": "integer"},
        "corpora": {"type": "object", "additionalProperties": _SHA256},
        "samples": _COUNT,
        "tokens_per_projection": _COUNT,
        "sequence_length": _COUNT,
    }
)
HEADER_SCHEMA = strict_object(
    {
        "kind": {"const": "header"},
        "version": {"const": TABLE_VERSION},
        "mofq": _NAME,
        "numerics": {**_COUNT, "description": "of the errors; only equal ones are compared"},
        "model": strict_object(
            {"name": _NAME, "index_sha256": _SHA256, "weights_sha256": _SHA256},
            optional=("weights_sha256",),
        ),
        "stats": {**_STATS, "type": ["object", "null"]},
        "groups": {"type": "array", "minItems": 1, "items": _GROUP},
        "unquantized": _NAMES,
        "other_bytes": _BYTES,
    },
    optional=("numerics",),
)
SPACE_SCHEMA = strict_object(
    {
        "kind": {"const": "space"},
        "name": _NAME,
        "sha256": _SHA256,
        "schemes": _NAMES,
        "base": _NAMES,
        "min_gain": _NOT_NEGATIVE,
        "engine": {"type": ["string", "null"]},
        "mofq": _NAME,
    }
)
REJECTION_SCHEMA = strict_object(
    {"kind": {"const": "rejection"}, "group": _NAME, "scheme": _NAME, "reason": _NAME}
)
ROW_SCHEMA = strict_object(
    {
        "kind": {"const": "row"},
        "group": _NAME,
        "scheme": _NAME,
        "unit": {"enum": list(UNITS)},
        "corpus": {"type": ["string", "null"]},
        "error": _NOT_NEGATIVE,
        "stderr": {"type": ["number", "null"], "minimum": 0},
        "bytes": _BYTES,
        "sqnr_db": {"type": ["number", "null"]},
        "sample_errors": _floats("nats per token of each sample; error is their mean"),
        "projections": _floats("signed sum over each chunk of tokens_per_projection tokens"),
        "static_amax": {"type": "object", "additionalProperties": _NOT_NEGATIVE},
    },
    optional=("sample_errors", "projections", "static_amax"),
)
_CREST = {"type": "object", "additionalProperties": _NOT_NEGATIVE}
_EXTENT = strict_object(
    {
        "amax": _floats("largest magnitude in each range of input channels"),
        "rms": _floats("largest root mean square of one channel in each range"),
        "crest": _CREST,
    }
)
PROFILE_SCHEMA = strict_object(
    {
        "kind": {"const": "profile"},
        "group": _NAME,
        "module": _NAME,
        "channels": _COUNT,
        "weight": _EXTENT,
        "inputs": {"type": "object", "additionalProperties": _EXTENT},
    }
)
CACHE_SCHEMA = strict_object(
    {
        "kind": {"const": "cache"},
        "name": _NAME,
        "module": _NAME,
        "kv_heads": _COUNT,
        "head_size": _COUNT,
        "decoder_layer": {"type": "integer", "minimum": 0},
    }
)
LINE_SCHEMAS: dict[str, dict[str, Any]] = {
    "header": HEADER_SCHEMA,
    "space": SPACE_SCHEMA,
    "rejection": REJECTION_SCHEMA,
    "profile": PROFILE_SCHEMA,
    "cache": CACHE_SCHEMA,
    "row": ROW_SCHEMA,
}
TABLE_LINE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "One line of a mofq table (table.jsonl)",
    "oneOf": list(LINE_SCHEMAS.values()),
}
