"""pi0 (arXiv 2410.24164) and pi0.5 (arXiv 2504.16054)."""
