"""Floor 2: one file per paper."""
