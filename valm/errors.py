"""The error that the command line shows as one sentence."""


class ValmError(ValueError):
    """An input cannot be used. The message names it, says what was found and what to do."""
