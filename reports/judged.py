"""What every report shares: which requests come first, what they are called, and how long they waited.

The rows that an operator must act on come first everywhere, so that a table cut short never hides a loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.verdicts import ENDS
from analysis.words import SOURCES
from probes.requests import BITS, bit_name, doubt, stateless
from reports.document import records
from reports.words import Clock, clip, duration, guest, plural, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from analysis.judge import Judgement

# Worst first; `copied`, `stale` and `exposed` stand between the ends, see _rank. Ends that are not named here come
# last.
_RANKS = ("lost", "copied", "undecided", "exposed", "stale", "open", "abandoned")
# Ends by which a request had its effect: too late, if the vCPU was reset before.
_SERVED = ("delivered", "reflected", "serviced")

#: VMMs as their projects write them, by the name of their program.
VMMS: Mapping[str, str] = {
    "qemu": "QEMU",
    "firecracker": "Firecracker",
    "cloud-hypervisor": "Cloud Hypervisor",
    "crosvm": "crosvm",
    "openvmm": "OpenVMM",
    "libkrun": "libkrun",
    "kvmtool": "kvmtool",
    "gvisor": "gVisor",
    "virtualbox": "VirtualBox",
}


#: Where a vCPU can be when a request is raised (a word of analysis.words.PLACES), in a few words for people.
PLACES: Mapping[str, str] = {
    "guest": "in the guest",
    "kernel": "in the kernel",
    "kvm_run": "in KVM_RUN",
    "halted": "halted",
    "ioctl": "in an ioctl",
    "user_space": "in user space",
    "unknown": "not seen",
}

#: The name of the request that ends a guest.
TRIPLE_FAULT = "triple_fault"

# Requests that a sentence names.
_NAMED = 5
# Cells of the name of a VMM that is not among them: it is whatever its file is called.
_VMM = 24


class Headline(NamedTuple):
    """The verdict in one line, and how bad it is: ``bad``, ``unsure`` or ``good``."""

    text: str
    tone: str


class Guest(NamedTuple):
    """A virtual machine as people know it."""

    name: str  # fit to be shown, see words.shown
    pid: int
    vmm: str
    cap: bool | None
    vcpus: int
    alive: bool = True


def headline(judgement: Judgement) -> Headline:
    """Return the verdict on a recording, and until when it reaches if nobody knows what came then."""
    text, tone = _verdict(judgement)
    if judgement.clean:
        return Headline(text, tone)
    return Headline(f"{text}: the recording breaks off at {_reach(judgement)}", tone)


def _reach(judgement: Judgement) -> str:
    return f"{Clock.of(judgement.meta).when(judgement.until_ns)[:19]} UTC"


def _verdict(judgement: Judgement) -> Headline:
    lifecycles = judgement.lifecycles
    lost = lifecycles["end"] == "lost"
    undecided = lifecycles["end"] == "undecided"
    carries = _carries(lifecycles)
    exposed = _exposed(lifecycles)
    which = _which(judgement, lifecycles[lost])
    if lost.any():
        return Headline(f"{plural(int(lost.sum()), 'request was', 'requests were')} LOST{which}", "bad")
    copied = _copied(lifecycles)
    if copied.any():
        which = _which(judgement, lifecycles[copied])
        were = plural(int(copied.sum()), "request was", "requests were")
        return Headline(f"nothing lost here, but {were} LOST from copies{which}", "bad")
    if judgement.dropped:
        return Headline(f"{plural(judgement.dropped, 'guest was', 'guests were')} restored without a shutdown", "bad")
    if (undecided & carries).any():
        return Headline(f"{plural(int((undecided & carries).sum()), 'request')} undecided, none seen lost", "unsure")
    if exposed.any():
        return Headline(f"nothing lost so far, {plural(int(exposed.sum()), 'request')} still exposed", "unsure")
    if undecided.any():
        count = int(undecided.sum())
        rest = (
            f"how {plural(count, 'request that carries no state', 'requests that carry no state')} ended was not seen"
        )
        return Headline(f"nothing seen lost; {rest}", "unsure")
    if judgement.exit_status == 4:
        return Headline("nothing seen lost, but not everything was seen", "unsure")
    if lifecycles.empty:
        return Headline("nothing lost: no request was raised", "good")
    return Headline("nothing lost", "good")


# Which requests, where several kinds were watched.
def _which(judgement: Judgement, lifecycles: pd.DataFrame) -> str:
    names = sorted(map(str, lifecycles["request"].unique()))
    return f": {', '.join(map(shown, names))}" if len(judgement.meta["requests"]) > 1 or len(names) > 1 else ""


def watched(judgement: Judgement) -> str:
    """Return what was judged and how much was watched for it, as one sentence."""
    meta = judgement.meta
    parts = [
        plural(len(judgement.lifecycles), "request"),
        plural(len(judgement.vms), "guest"),
        plural(int(judgement.vms["vcpus"].sum()), "vCPU"),
    ]
    sentence = f"{parts[0]} judged in {parts[1]} with {parts[2]}"
    if meta.get("ended_ns") is not None:
        sentence += f", watched for {duration(meta['ended_ns'] - meta['started_ns'])}"
    boundaries = (meta.get("counters") or {}).get("boundaries")
    if boundaries is not None:
        sentence += f" over {plural(int(boundaries), 'user-space boundary', 'user-space boundaries')}"
    return sentence + "."


def where(judgement: Judgement) -> str:
    """Return where and when the recording was made, as one sentence."""
    meta = judgement.meta
    host, kernel, engine = (shown(str(meta[key])) for key in ("host", "kernel", "engine"))
    began = Clock.of(meta).when(meta["started_ns"])
    return f"Host {host}, Linux {kernel}, engine {engine}, from {began} UTC."


def names_remark(judgement: Judgement, names: Iterable[str] | None = None) -> str:
    """Say that requests may not be what they are called, of all those that were judged or of some ``names``.

    Empty where none of them may be another one on the kernel that was recorded.
    """
    meta = judgement.meta
    if meta.get("requests_table_exact", True):
        return ""
    if names is None:
        tables = (judgement.lifecycles, judgement.ordering.breaks)
        names = {str(name) for of in tables for name in of["request"].unique()}
    said = doubt(shown(str(meta["requests_table"])), names)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def requests_watched(names: Sequence[str]) -> str:
    """Return the requests that were watched; bits without a name, of which there are many in ``all``, as one."""
    unnamed = {bit_name(bit) for bit in range(BITS)}
    named = [shown(str(name)) for name in names if name not in unnamed]
    rest = len(names) - len(named)
    if rest > 1:
        return ", ".join([*named, plural(rest, "bit without a name", "bits without a name")])
    return ", ".join(shown(str(name)) for name in names)


def other_shutdowns(judgement: Judgement) -> pd.DataFrame:
    """Return the shutdowns and deaths that no request made, by the guest, by KVM, or by neither."""
    return judgement.shutdowns[judgement.shutdowns["source"] != "request"]


def sources_told(shutdowns: pd.DataFrame) -> list[str]:
    """Return what each source means that there is, in the order of analysis.words.SOURCES."""
    there = set(map(str, shutdowns["source"].unique()))
    return [f"{source}: {meaning}" for source, meaning in SOURCES.items() if source in there]


def guests(vms: pd.DataFrame) -> dict[int, Guest]:
    """Return the guests of a recording by their number, which tells apart those of the same name."""
    rows = records(vms)
    names = [guest(row["name"], row["pid"]) for row in rows]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return {
        row["vm"]: Guest(
            f"{name} #{row['vm']}" if name in twice else name,
            row["pid"],
            vmm(row["vmm"]),
            row["triple_fault_cap"],
            row["vcpus"],
            row["alive"],
        )
        for row, name in zip(rows, names, strict=True)
    }


def exposure(known: Mapping[int, Guest]) -> list[Guest]:
    """Return the guests that run, those first that would lose a pending shutdown; then those that ended, by VMM.

    Of several that ended the name says how many they are, and the process is 0.
    """
    running = [each for each in known.values() if each.alive]
    gone: dict[tuple[str, bool | None], list[Guest]] = {}
    for each in known.values():
        if not each.alive:
            gone.setdefault((each.vmm, each.cap), []).append(each)
    ended = map(_together, gone.values())
    return [each for some in (running, ended) for each in sorted(some, key=_would_lose_first)]


def _would_lose_first(one: Guest) -> tuple[bool, bool]:
    return one.cap is not False, one.cap is not None


def _together(ended: Sequence[Guest]) -> Guest:
    if len(ended) == 1:
        return ended[0]
    name = f"{len(ended):,} guests that ended"
    return ended[0]._replace(name=name, pid=0, vcpus=sum(each.vcpus for each in ended))


def guest_of(row: Mapping[str, Any], known: Mapping[int, Guest]) -> Guest:
    """Return the guest of a lifecycle or shutdown, even if the event that introduced it was lost."""
    return known.get(row["vm"]) or Guest(guest(None, row["pid"]), row["pid"], "", None, 0)


def vmm(name: object) -> str:
    """Return the name of a VMM as its project writes it; empty if it is not known."""
    if not isinstance(name, str):
        return ""
    return VMMS.get(name.lower().replace("_", "-").replace(" ", "-"), clip(shown(name), _VMM))


# What the order of lifecycles is made from: there can be millions of them, and their other columns are not copied.
_RANKED = ["request", "end", "raised_ns", "blind_saves", "copies_without", "stale", "exposed"]


def ranked(lifecycles: pd.DataFrame, chosen: pd.Series[bool]) -> NDArray[np.intp]:
    """Return the places of these lifecycles with those that need an operator first, then in order of time."""
    places = np.flatnonzero(chosen)
    rows = lifecycles[_RANKED].iloc[places]
    return places[np.lexsort((rows["raised_ns"], ~_carries(rows), _rank(rows)))]


def needs_action(lifecycles: pd.DataFrame) -> pd.Series[bool]:
    """Return which lifecycles an operator must do something about.

    A request without guest-visible state is none of them, whatever became of it.
    """
    return (_rank(lifecycles) < _RANKS.index("open")) & (_carries(lifecycles) | (lifecycles["end"] != "undecided"))


def one_by_one(lifecycles: pd.DataFrame) -> pd.Series[bool]:
    """Return which lifecycles a report tells one by one; there can be millions of the others.

    Those that need an operator, those that were in danger, and each triple fault: it is the end of a guest.
    """
    pending = lifecycles["end"].isin(("open", "abandoned", "handed_over"))
    return needs_action(lifecycles) | (pending & _carries(lifecycles)) | (lifecycles["request"] == TRIPLE_FAULT)


def grouped(lifecycles: pd.DataFrame) -> pd.DataFrame:
    """Return how many requests ended how: a row for each request, the most frequent first.

    Columns: ``request``, a column for each end that occurs, in the order of :data:`analysis.verdicts.ENDS`, ``count``,
    ``raised_by`` (by whom most were) and ``share`` of these.
    """
    keys = ["request", "end", "raised_by"]
    sizes = lifecycles.groupby(keys, sort=False, observed=True).size().rename("count").reset_index()
    sizes = sizes.astype(dict.fromkeys(keys, "object"))  # a categorical index takes no new column
    ends = sizes.pivot_table(index="request", columns="end", values="count", aggfunc="sum", fill_value=0)
    by = sizes.groupby(["request", "raised_by"], sort=False)["count"].sum().reset_index()
    most = by.sort_values("count", ascending=False, kind="stable").drop_duplicates("request").set_index("request")
    table = ends[[end for end in ENDS if end in ends.columns]].astype("int64")
    table["count"] = table.sum(axis="columns")
    table["raised_by"] = most["raised_by"]
    table["share"] = most["count"] / table["count"]
    return table.sort_values("count", ascending=False, kind="stable").reset_index()


def mostly(row: Mapping[str, Any]) -> str:
    """Return by whom most requests of a row of :func:`grouped` were raised."""
    by, share = shown(row["raised_by"]), row["share"]
    return by if share == 1 else f"{by} {max(min(round(share * 100), 99), 1)} %"


def dropped(lifecycles: pd.DataFrame) -> str:
    """Say how many requests without guest-visible state ended with their vCPU; empty if none did."""
    names = lifecycles["request"][(lifecycles["end"] == "abandoned") & ~_carries(lifecycles)]
    if names.empty:
        return ""
    counts = names.astype("object").value_counts()  # of categories it would list those that do not occur
    told = [f"{shown(str(name))} {count:,}" for name, count in counts.head(_NAMED).items()]
    told += ["others"] if len(counts) > _NAMED else []
    were = plural(len(names), "request was", "requests were")
    return (
        f"{were} dropped with the vCPU ({', '.join(told)}). That is no loss: none carries guest-visible state, "
        "which a save would have to keep."
    )


def _carries(lifecycles: pd.DataFrame) -> pd.Series[bool]:
    """Return which of them stand for something that a save must keep, or may: a bit that has no name."""
    names = (str(name) for name in lifecycles["request"].unique())
    return lifecycles["request"].isin([name for name in names if not stateless(name)])


# The place of each row in _RANKS.
def _rank(lifecycles: pd.DataFrame) -> pd.Series[Any]:
    end = lifecycles["end"]
    rank = np.full(len(end), len(_RANKS), np.int8)
    for place, name in enumerate(_RANKS):
        rank[end == name] = place
    rank[lifecycles["stale"].astype(bool) & end.isin(_SERVED)] = _RANKS.index("stale")
    rank[_copied(lifecycles)] = _RANKS.index("copied")
    rank[_exposed(lifecycles)] = _RANKS.index("exposed")
    return pd.Series(rank, lifecycles.index)


def _exposed(lifecycles: pd.DataFrame) -> pd.Series[bool]:
    return (lifecycles["end"] == "open") & lifecycles["exposed"].astype(bool)


# As left_out(), of each; what a save need not keep is in no danger.
def _copied(lifecycles: pd.DataFrame) -> pd.Series[bool]:
    told = lifecycles["copies_without"].astype(bool) & (lifecycles["end"] != "lost") & ~_exposed(lifecycles)
    return told & _carries(lifecycles)


def left_out(row: Mapping[str, Any]) -> bool:
    """Tell whether a copy lacks a request, and not only because it is lost altogether, or exposed to that."""
    return bool(row["copies_without"]) and row["end"] != "lost" and not (row["end"] == "open" and row["exposed"])


def outcome(row: Mapping[str, Any]) -> str:
    """Return the end of a lifecycle with what qualifies it, such as ``delivered, stale``."""
    marks = [str(row["end"])]
    if row["end"] == "open" and row["exposed"]:
        marks.append("exposed")
    if row["end"] in _SERVED and row["stale"]:
        marks.append("stale")
    if left_out(row):
        marks.append("not in a copy")
    return ", ".join(marks)


def wait(row: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the least and the longest time that a request was pending; None for a longest not known."""
    lower = max(int(row["ended_after_ns"]) - int(row["raised_ns"]), 0)
    ended = row["ended_ns"]
    if ended is None or ended < 0 or row["raised_after_ns"] <= 0:
        return lower, None
    return lower, int(ended) - int(row["raised_after_ns"])


class BlindSave(NamedTuple):
    """A save that left a request out, as people read it."""

    guest: str
    vcpu: int
    request: str
    time_ns: int
    read: Sequence[str]
    then: str  # what the vCPU did
    runs_as: str  # the guest that was made of it, if one was seen to run


def blind_saves(judgement: Judgement, known: Mapping[int, Guest], most: int) -> tuple[list[BlindSave], int]:
    """Return the first saves that left a request out, those of which a copy was seen to run, and how many more."""
    saves = judgement.saves[~judgement.saves["carried"]]
    first = saves.iloc[np.lexsort((saves["time_ns"], saves["ran_as"] < 0))].head(most)
    told = [
        BlindSave(
            guest_of(row, known).name,
            row["vcpu"],
            shown(row["request"]),
            row["time_ns"],
            row["read"].split(","),
            "ran on" if row["ran_again"] else "ended",
            known[row["ran_as"]].name if row["ran_as"] in known else "",
        )
        for row in records(first)
    ]
    return told, len(saves) - len(told)


def stories(story: pd.DataFrame) -> dict[Any, pd.DataFrame]:
    """Return the story of each lifecycle by its vCPU number, request and raise."""
    # Not dict(groupby): that would take the grouping's own `keys` for a mapping's.
    groups = story.groupby(["vcpu_number", "request", "raised_ns"], observed=True, sort=False)
    return {key: part for key, part in groups}  # noqa: C416


class Fact(NamedTuple):
    """A line about the recording: what it is called and what it is."""

    name: str
    text: str


def recording_facts(judgement: Judgement) -> Sequence[Fact]:
    """Return where, when and how the recording was made."""
    meta = judgement.meta
    clock = Clock.of(meta)
    ended_ns = meta.get("ended_ns")
    engine = f"{meta['engine']}: {meta['engine_why']}" if meta.get("engine_why") else str(meta["engine"])
    parameters = ", ".join(f"{key}={value}" for key, value in sorted((meta.get("kvm_parameters") or {}).items()))
    facts = [
        Fact("host", shown(str(meta["host"]))),
        Fact("kernel", shown(str(meta["kernel"]))),
        Fact("KVM module", shown(str(meta.get("kvm_module") or "not known"))),
        Fact("its parameters", shown(parameters)),
        Fact("engine", shown(engine)),
        Fact("detail", shown(str(meta["detail"]))),
        Fact("requests", requests_watched(meta["requests"])),
        Fact("their names", names_remark(judgement, meta["requests"])),
        Fact("began", f"{clock.when(meta['started_ns'])} UTC"),
        Fact(
            "ended",
            f"{clock.when(ended_ns)} UTC"
            if ended_ns is not None
            else f"not known: it breaks off at {_reach(judgement)}",
        ),
        Fact("events", f"{judgement.events:,}"),
    ]
    return [fact for fact in facts if fact.text]


def losses(judgement: Judgement) -> Sequence[Fact]:
    """Return what the tracer could not record, by cause; empty if it recorded everything."""
    loss = judgement.loss
    facts = [
        (loss.ring_full, "ring full", "events for which the ring had no room"),
        (
            loss.kicks,
            "kicks",
            "kicks, and requests to several vCPUs, for which the ring had no room: no verdict hangs on them",
        ),
        (
            loss.map_full,
            "map full",
            "vCPUs, threads or guests that did not fit the tracer's maps: not traced",
        ),
        (loss.missed, "missed", "hooks that did not run, or did not find their vCPU"),
        (
            loss.unanswered,
            "unanswered",
            "vCPUs that ran already and were not seen when they were asked: what was pending in them is not known",
        ),
        (loss.not_written, "not written", "events that reached the tracer but not the disk"),
    ]
    lost = [Fact(name, f"{count:,} {meaning}") for count, name, meaning in facts if count]
    lost += [Fact("left out", shown(str(reason))) for reason in judgement.left_out]
    if not judgement.vouched:
        lost.append(Fact("not tried", "nothing was seen, and nothing shows that the hooks would have seen it"))
    if judgement.unaccounted:
        meaning = "events that the hooks produced are neither in it nor counted as lost"
        lost.append(Fact("not there", f"{judgement.unaccounted:,} {meaning}"))
    if not judgement.clean:
        what = "the recorder did not end by itself, or it is at work: what came later is not known"
        lost.append(Fact("no end", f"it breaks off at {_reach(judgement)}; {what}"))
    return lost


def unseen(judgement: Judgement) -> Sequence[Fact]:
    """Return what the engine cannot see on this host, by the fact that is missing."""
    plan = judgement.meta.get("plan") or ()
    return [Fact(shown(str(entry["fact"])), shown(str(entry["unseen"]))) for entry in plan if entry.get("unseen")]
