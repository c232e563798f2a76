"""Tunes the norms of a quantized model against the original, and puts them where they belong.

``norms`` finds them, ``tune`` steps on them and judges the outcome, ``tensors`` reads those of a
recipe, for whatever applies, checks or exports it.
"""
