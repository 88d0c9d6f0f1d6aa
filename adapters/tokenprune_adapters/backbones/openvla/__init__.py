"""OpenVLA (arXiv 2406.09246)."""
