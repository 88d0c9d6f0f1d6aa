"""Comparisons with implementations that need an environment of their own; `make peer` makes it and runs them."""
