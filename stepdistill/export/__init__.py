"""Floor 4: from a trained student to something Diffusers loads."""
