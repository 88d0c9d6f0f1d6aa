"""What several strategies use: base stages, ranks, similarity, attention, merging, picture analysis, a CLIP."""
