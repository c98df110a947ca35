"""Recordings, as report, export and demo make something of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from command.notes import note

if TYPE_CHECKING:
    from analysis.judge import Judgement
    from reports.source import Source
    from tracer.recording import Recording


def source(recording: Recording, judgement: Judgement) -> Source:
    """Return what the reports of a judged recording are made of."""
    from analysis.judge import story
    from analysis.timeline import timeline
    from reports.source import Source

    names = {int(bit): name for bit, name in recording.meta["requests_by_bit"].items()}
    lived = partial(timeline, recording, names=names)
    return Source(judgement, partial(story, recording, saves=judgement.saves), lived, recording.path.resolve().name)


def whole(recordings: Sequence[Recording]) -> bool:
    """Tell whether recordings that have been read were whole, and note what was left out."""
    for recording in recordings:
        if not recording.clean:
            note(f"{recording.path} did not end cleanly: what came after its last segment is not in it")
    damaged = [f"{recording.path}/{part}" for recording in recordings for part in recording.left_out]
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        note(f"{damaged[0]}{more} (left out: what it held is undecided; restore it from a copy)")
    return not damaged
