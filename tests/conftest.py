"""How thorough property tests are: as thorough as they say, or quick, for `make check`."""

from __future__ import annotations

from hypothesis import settings

from tests.examples import QUICK

# For those that say nothing of how many; tests.examples is for those that do. pytest --hypothesis-profile quick.
settings.register_profile("quick", max_examples=QUICK)
