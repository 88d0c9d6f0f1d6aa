"""Baselines without which no comparison means anything. Imports no torch."""
