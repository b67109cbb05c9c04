"""stepdistill: diffusion models from 25-50 sampling steps down to 1-8, with the numbers that show how many are needed."""

__version__ = "0.1.0"
