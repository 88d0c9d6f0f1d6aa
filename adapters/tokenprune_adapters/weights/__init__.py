"""Checkpoint files: where they are, which tensors they hold, and how to load them into a model."""
