"""Pipelines beside the dense policy on a recorded episode."""
