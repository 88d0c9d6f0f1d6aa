"""OpenVLA-OFT (arXiv 2502.19645)."""
