"""How plugins declare themselves and are found. Imports no torch."""
