"""From a pipeline file to a pipeline bound to a backbone, planned and counted."""
