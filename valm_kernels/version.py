"""The version, defined once: pyproject.toml and both packages read it here."""

__version__ = "0.1.0"
