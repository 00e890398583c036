"""What was tried and seen, which conftest.py shows at the end of a run without other processes."""

from collections import Counter

COUNTS: Counter[str] = Counter()
