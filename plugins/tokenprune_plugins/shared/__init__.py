"""What several strategies use: bases, ranks, grids, similarity, attention rows, merging, picture analysis."""
