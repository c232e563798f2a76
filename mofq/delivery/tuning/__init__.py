"""Tunes a quantized model against the original: norms, and codes and scales of weights.

``norms`` finds the first, ``codes`` has the others while they are learned, ``tune`` steps on both
and judges the outcome, ``tensors`` reads those of a recipe, for whatever applies, checks or exports
it.
"""
