"""The decoder loop and its parts: layers, attention rows, keys and values, dimensions, FLOPs. Knows no stage."""
