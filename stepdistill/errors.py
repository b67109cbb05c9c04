"""The two exceptions that recipes and the command line print without a traceback."""


class InputError(ValueError):
    """Bad input: the message says what was expected, what was found, and what to change."""


class ExportError(RuntimeError):
    """An export that does not load back as what was trained; the message says how far off it is and where."""
