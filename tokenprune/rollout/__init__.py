"""Closed-loop evaluation: policies with pipelines act in simulated environments, in paired episodes."""
