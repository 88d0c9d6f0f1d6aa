"""Baselines that every strategy should be compared with. Imports no torch."""
