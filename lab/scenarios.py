"""Every scenario, by name: those of a pending triple fault, and those of KVM's other requests."""

from __future__ import annotations

from collections.abc import Mapping

from lab import faults, requests, saves
from lab.stage import DECLARED, Scenario

_PLAYED = (faults, requests, saves)  # what is imported for what it declares

SCENARIOS: Mapping[str, Scenario] = DECLARED
