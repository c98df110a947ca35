"""Every scenario, by name: those of a pending triple fault, of KVM's other requests, of saves and of ends."""

from __future__ import annotations

from collections.abc import Mapping

from lab import ends, faults, requests, saves
from lab.stage import DECLARED, Scenario

_PLAYED = (faults, requests, saves, ends)  # what is imported for what it declares

SCENARIOS: Mapping[str, Scenario] = DECLARED
