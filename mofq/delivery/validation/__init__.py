"""Validates a quantized model against the original: what it is, and what it does.

``enforcement`` reads every layer back and compares it with the recipe,
``divergence`` runs both models over a text, ``tasks`` lets lm-eval score both,
``candidates`` opens what is to be validated, ``against_original`` joins them, and
``report`` is the result. ``measured_kl`` measures one recipe after another in one
loaded model, for the search.
"""

from __future__ import annotations

from mofq.delivery.validation.against_original import validate_many
from mofq.delivery.validation.enforcement import find_deviations
from mofq.delivery.validation.report import Validation, read_validation, write_validation
from mofq.delivery.validation.tasks import Tasks

__all__ = [
    "Tasks",
    "Validation",
    "find_deviations",
    "read_validation",
    "validate_many",
    "write_validation",
]
