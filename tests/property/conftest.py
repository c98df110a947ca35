"""The property tests hold the compiled core against their oracles; the unit tests run it plain."""

from __future__ import annotations

import pytest

from analysis import compiled


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    compiled.start()
