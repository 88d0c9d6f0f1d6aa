"""Pictures of what a pipeline kept and why, drawn from result files; needs the extra `viz` (matplotlib)."""
