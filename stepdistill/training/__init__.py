"""Floor 3: the loop, and everything that exists once per run."""
