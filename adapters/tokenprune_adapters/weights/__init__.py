"""Checkpoint files: where they are, which tensors they hold, and how these come into a model."""
