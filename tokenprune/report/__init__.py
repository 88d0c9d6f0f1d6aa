"""What every result shares: where it comes from, what it describes, how it is written and printed."""
