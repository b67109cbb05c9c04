"""Floor 1: what has weights."""
