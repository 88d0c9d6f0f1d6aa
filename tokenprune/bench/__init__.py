"""Measuring pipelines against the dense policy."""
