"""Runs one query: asks the stages, cuts between layers, records what happened."""
