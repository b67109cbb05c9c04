"""Floor 0: the maths of diffusion, as pure functions on tensors."""
