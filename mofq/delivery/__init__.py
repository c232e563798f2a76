"""From a recipe to what is served: rewriting, applying, exporting, validating."""
