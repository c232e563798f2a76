"""Recipes written as checkpoints and as other tools' recipes."""
