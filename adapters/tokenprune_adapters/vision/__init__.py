"""Vision towers, and their attention for stages."""
