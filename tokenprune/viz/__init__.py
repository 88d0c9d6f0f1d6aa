"""Pictures of what a pipeline kept; reads result files only. Needs the extra `viz` (matplotlib)."""
