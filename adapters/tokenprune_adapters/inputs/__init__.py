"""Pre- and postprocessing: camera frames, tokenizers, dataset statistics."""
