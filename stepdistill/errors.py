"""The one exception for what a user can fix. Recipes and the command line print it without a traceback."""


class InputError(ValueError):
    """Bad input: the message says what was expected, what was found, and what to change."""
