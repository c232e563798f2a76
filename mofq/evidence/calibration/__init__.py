"""Runs corpora through the model once and keeps what every later scheme is scored with.

``run`` does the forward and backward passes, ``capture`` takes inputs and output
gradients from each linear layer, ``stats`` is the folder that they end in.
"""
