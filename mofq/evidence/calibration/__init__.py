"""Runs corpora through the model once and keeps what every later scheme is scored with."""
