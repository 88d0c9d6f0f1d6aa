"""Vision towers and what stages may know of their attention."""
