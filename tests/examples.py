"""How many examples a property test takes."""

from __future__ import annotations

from hypothesis import settings

#: Of a test that says nothing: by hypothesis, and in the profile `quick` (see tests/conftest.py).
USUAL, QUICK = 100, 20


def examples(thorough: int) -> int:
    """Return how many examples a test takes that takes so many when there is time: fewer in the profile `quick`."""
    return max(1, thorough * settings().max_examples // USUAL)
