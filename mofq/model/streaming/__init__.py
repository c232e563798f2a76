"""Runs a model one decoder layer after the other, with the weights of one in memory at a time."""
