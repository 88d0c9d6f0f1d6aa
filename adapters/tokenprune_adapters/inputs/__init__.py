"""Observations on their way in and actions on their way out: frames, tokenizers, statistics."""
