"""SpecPrune-VLA (arXiv 2509.05614): static and dynamic pruning and an action-aware controller. Imports no torch."""
