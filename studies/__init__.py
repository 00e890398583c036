"""Experiments with valm: they use it as anyone may, and are not installed with it."""
