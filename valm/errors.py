"""The error that the command line shows as one sentence."""


class ValmError(ValueError):
    """Something the user gave cannot be used. The message names it, says what was found and what to do."""
