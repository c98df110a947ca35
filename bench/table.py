"""The table: one line for each figure, with the bound that it must keep beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A measured figure. ``bound`` is what the figure may be at most, or at least with ``at_least``."""

    part: str
    what: str
    value: float
    unit: str
    bound: float | None = None
    at_least: bool = False

    @property
    def kept(self) -> bool | None:
        """Tell whether the bound is kept; None where there is none."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """Return the figure as a line of the table."""
        bound = "" if self.bound is None else f"{'>=' if self.at_least else '<='} {_number(self.bound)}"
        verdict = {True: "ok", False: "MISSED", None: ""}[self.kept]
        return f"{self.part:<9}{self.what:<53}{_number(self.value):>8} {self.unit:<8}{bound:<9}{verdict}".rstrip()


@dataclass(frozen=True)
class Missing:
    """What could not be measured, and why: no figure, and no bound missed."""

    part: str
    what: str
    why: str
    kept = None

    def line(self) -> str:
        """Return it as a line of the table."""
        return f"{self.part:<9}{self.what:<53}{'-':>8} {self.why}"


def heading() -> str:
    """Return the first line of the table."""
    return f"{'part':<9}{'figure':<53}{'measured':>8} {'':<8}{'bound':<9}"


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
