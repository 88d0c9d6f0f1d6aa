"""LIBERO (arXiv 2306.03310) with the conventions of OpenVLA-OFT's evaluation in it."""
