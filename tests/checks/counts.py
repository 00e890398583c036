"""Counts of what was tried and seen; conftest.py prints them at the end of a run in one process."""

from collections import Counter

COUNTS: Counter[str] = Counter()
