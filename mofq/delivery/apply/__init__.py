"""Recipes applied to a model in memory."""
