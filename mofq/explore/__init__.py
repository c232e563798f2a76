"""A table as one HTML page, to be looked at and to take recipes from."""
