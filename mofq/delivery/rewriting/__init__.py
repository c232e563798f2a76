"""Rewrites a checkpoint without changing what it computes, so that it quantizes better.

``sites`` finds where a scale can move, ``scales`` proposes how much, ``choose_scales`` predicts
what each proposal does and takes the best, ``write`` makes an ordinary model folder of it.
"""
