"""Floor 1: which samples, in which order, as which tensors."""
